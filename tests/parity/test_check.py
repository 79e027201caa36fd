"""The check passes on an honest bundle, and each level fails on what it is for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import BundleError, GapExportError, ImageError, UsageError
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.parity.check import needs_reference
from gap_export.parity.golden import open_golden
from gap_export.parity.question import Question
from gap_export.parity.record import record_truth
from gap_export.parity.results import LEVELS
from gap_export.parity.truth import GoldenTruth
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.spec.manifest import EngineLimits
from gap_export.spec.tolerances import TOLERANCES
from tests.parity import mutants
from tests.parity.checking import failed_outputs, level_of, outputs, run, statuses
from tests.runtime.backends.fake_tensorrt import copy_bundle, use_fakes, write_engines

LIMITS = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=1, max_images=1)
ALL_PASSED = dict.fromkeys(LEVELS, "passed")
DECODER = {"logits (prefill)", "logits (decode)", "logits (padded batch)"}


def double_logits(monkeypatch):
    honest = OnnxRuntimeBackend.decode
    monkeypatch.setattr(OnnxRuntimeBackend, "decode", lambda self, *given: 2 * honest(self, *given))


@pytest.fixture(scope="module")
def engine_bundle(tiny_bundle, tmp_path_factory):
    """Makes a bundle with engines of one dtype."""
    made: dict[str, Path] = {}

    def make(dtype: str) -> Path:
        if dtype not in made:
            bundle = copy_bundle(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle")
            write_engines(bundle, LIMITS, dtype=dtype)
            made[dtype] = bundle.path
        return made[dtype]

    return make


def test_an_honest_bundle_passes_at_every_level(tiny_bundle, truth):
    report = run(tiny_bundle, truth)
    assert report.passed and statuses(report) == ALL_PASSED
    assert {row.tensor for row in outputs(report)} == {
        "image_features", "keep_indices", "inputs_embeds", "logits (cached)", *DECODER,
    }  # fmt: skip
    assert all(row.why for row in outputs(report))
    assert level_of(report, "token").figures["equal"] == report.questions == 3
    assert [row.call for row in level_of(report, "positions").rows] == [
        "prefill", "decode 1", "decode 2", "decode 50",
    ]  # fmt: skip
    assert report.reference.startswith("PyTorch")
    assert report.backends[0].name.startswith("ONNX Runtime")
    assert report.backends[0].divergences == ()


def test_a_bundle_whose_pruner_reads_the_text_passes(tiny_text_bundle, ask_torch, questions):
    report = run(tiny_text_bundle, ask_torch(questions[:1]))
    assert report.passed, report.to_plain()
    assert "text_embeds" in {row.tensor for row in outputs(report)}


def test_only_the_levels_asked_for_are_compared(tiny_bundle, truth, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("answers are not asked for")

    monkeypatch.setattr("gap_export.parity.candidate._ask", refuse)
    report = run(tiny_bundle, truth, levels=("tensor", "positions"))
    assert statuses(report) == {"positions": "passed", "tensor": "passed"}
    # In the order of all levels, whatever the order asked for.
    assert [level.level for level in report.backends[0].levels] == ["positions", "tensor"]


def test_positions_alone_need_no_reference(tiny_bundle):
    report = run(tiny_bundle, None, levels=("positions",))
    assert report.passed and statuses(report) == {"positions": "passed"}
    assert (report.questions, report.reference) == (0, "the prompt itself")
    assert not needs_reference(("positions",)) and needs_reference(("positions", "box"))


def test_one_reference_serves_backends_of_one_dtype(
    engine_bundle, ask_torch, questions, monkeypatch
):
    use_fakes(monkeypatch)
    asked = []
    decode = TorchBackend.decode

    def count(self, feed, cache):
        asked.append(feed["position_ids"].shape)
        return decode(self, feed, cache)

    monkeypatch.setattr(TorchBackend, "decode", count)
    own = ask_torch(questions[:1])
    run(engine_bundle("float32"), own, levels=("box",))
    alone = len(asked)
    report = run(engine_bundle("float32"), own, levels=("box",), backends=("ort", "trt"))
    assert report.passed and len(report.backends) == 3
    assert len(asked) == alone


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_engines_are_compared_with_pytorch_in_their_own_dtype(
    engine_bundle, truth, monkeypatch, dtype
):
    use_fakes(monkeypatch)
    report = run(engine_bundle(dtype), truth, backends=("trt",))
    assert report.backends[0].name == f"TensorRT 10.16.0 (Fake GPU, desktop-sm89, {dtype})"
    assert report.passed, report.to_plain()
    (features,) = [row for row in outputs(report) if row.tensor == "image_features"]
    tolerance = TOLERANCES[dtype]["image_features"]
    assert features.atol == pytest.approx(tolerance.absolute(features.max_abs_reference))
    # An engine cannot be looked into, and the report says what was.
    positions = level_of(report, "positions")
    assert "which the engine was built from" in positions.reason


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize(
    ("output", "spoil"),
    [
        ("logits (prefill)", lambda logits: logits[:, ::-1].copy()),
        ("inputs_embeds", lambda embeds: embeds + np.float32(1e-3)),
        ("keep_indices", lambda keep: keep[:, ::-1].copy()),
        ("image_features", lambda features: features * np.float32(np.nan)),
    ],
    ids=["permuted", "shifted", "order", "nan"],
)
def test_a_wrong_output_fails_by_name(tiny_bundle, truth, monkeypatch, output, spoil):
    run_honestly, decode = OnnxRuntimeBackend.run, OnnxRuntimeBackend.decode

    def run_spoilt(self, component, feed):
        outputs = run_honestly(self, component, feed)
        return {name: spoil(v) if name == output else v for name, v in outputs.items()}

    monkeypatch.setattr(OnnxRuntimeBackend, "run", run_spoilt)
    if output.startswith("logits"):
        monkeypatch.setattr(OnnxRuntimeBackend, "decode", lambda *given: spoil(decode(*given)))
    report = run(tiny_bundle, truth, levels=("tensor",))
    assert not report.passed
    assert output in failed_outputs(report)
    assert output in level_of(report, "tensor").reason


def test_doubled_logits_fail_as_tensors_and_nowhere_else(tiny_bundle, truth, monkeypatch):
    double_logits(monkeypatch)
    report = run(tiny_bundle, truth)
    assert statuses(report) == {**ALL_PASSED, "tensor": "failed"}
    assert failed_outputs(report).keys() == DECODER
    # The graph is right: it was run by somebody who doubles.
    assert report.backends[0].divergences == ()
    assert "what is wrong lies in how it was run" in level_of(report, "tensor").reason


@pytest.mark.usefixtures("blind")
def test_another_choice_of_tokens_fails_in_answers_and_not_in_tensors(
    tiny_bundle, truth, monkeypatch
):
    """The graphs are right, and the loop around them takes the least likely token."""
    honest = OnnxRuntimeBackend.decode
    asked = "gap_export.parity.candidate._ask"
    from gap_export.parity.candidate import _ask

    def perverse(session, question):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OnnxRuntimeBackend, "decode", lambda *given: -honest(*given))
            return _ask(session, question)

    monkeypatch.setattr(asked, perverse)
    report = run(tiny_bundle, truth)
    # Nobody found an object before: there is nothing to lose.
    assert statuses(report)["tensor"] == statuses(report)["positions"] == "passed"
    token = level_of(report, "token")
    assert token.status == "failed" and token.figures["equal"] == 0
    assert all(row.step == 1 and row.margin > 0 for row in token.rows)
    assert run(tiny_bundle, truth, levels=("token",), fail_under={"token": 0.0}).passed


@pytest.mark.usefixtures("blind")
def test_a_candidate_that_breaks_down_fails_and_does_not_end_the_check(
    tiny_bundle, truth, monkeypatch
):
    def out_of_order(self, feed, cache):
        raise GapExportError("the decoder is out of order")

    monkeypatch.setattr(OnnxRuntimeBackend, "decode", out_of_order)
    report = run(tiny_bundle, truth)
    assert statuses(report) == {
        "positions": "passed", "tensor": "failed", "token": "failed", "box": "failed",
        "task": "passed",
    }  # fmt: skip
    assert level_of(report, "tensor").reason == "the decoder is out of order"
    assert level_of(report, "token").rows[0].candidate == "error: the decoder is out of order"


@pytest.mark.usefixtures("blind")
def test_compact_positions_fed_to_the_graph_fail_in_logits(tiny_bundle, truth, monkeypatch):
    honest = OnnxRuntimeBackend.decode

    def compact(self, feed, cache):
        shape = feed["kept_positions"].shape
        table = np.broadcast_to(np.arange(shape[1]), shape)
        return honest(self, {**feed, "kept_positions": table}, cache)

    monkeypatch.setattr(OnnxRuntimeBackend, "decode", compact)
    report = run(tiny_bundle, truth, levels=("positions", "tensor"))
    assert failed_outputs(report).keys() == DECODER
    # The graph itself is right.
    assert statuses(report)["positions"] == "passed"


def test_a_graph_without_its_gap_node_fails_in_positions_and_logits(tiny_bundle, truth, tmp_path):
    wrong = mutants.gap_node_removed(tiny_bundle, tmp_path / "wrong")
    report = run(wrong, truth, levels=("positions", "tensor"))
    assert statuses(report) == {"positions": "failed", "tensor": "failed"}
    assert not any(row.passed for row in level_of(report, "positions").rows)
    assert failed_outputs(report).keys() == DECODER
    # And it is told where that begins.
    (found,) = report.backends[0].divergences
    assert found.component == "decoder_model_merged"


def test_ids_that_attention_cannot_tell_apart_fail_in_positions_alone(tiny_bundle, truth, tmp_path):
    wrong = mutants.table_off_by_one(tiny_bundle, tmp_path / "wrong")
    report = run(wrong, truth)
    assert statuses(report) == {**ALL_PASSED, "positions": "failed"}
    assert "decode 50" in level_of(report, "positions").reason


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize(("gap", "passes"), [(1e-4, True), (1e-3, False)])
def test_a_flipped_token_is_a_tie_only_where_the_reference_is_undecided(
    tiny_bundle, ask_torch, questions, monkeypatch, gap, passes
):
    """Both sides get logits whose best two are ``gap`` apart, the other way round in ONNX."""

    def nearly_tied(logits, sign):
        order = np.argsort(logits, axis=1)
        best, second = order[:, -1:], order[:, -2:-1]
        low, high = np.minimum(best, second), np.maximum(best, second)
        top = np.take_along_axis(logits, best, axis=1)
        edited = logits.copy()
        np.put_along_axis(edited, low, top + sign * np.float32(gap / 4), axis=1)
        np.put_along_axis(edited, high, top - sign * np.float32(gap / 4), axis=1)
        return edited

    for backend, sign in ((OnnxRuntimeBackend, -1), (TorchBackend, 1)):
        honest = backend.decode
        monkeypatch.setattr(
            backend,
            "decode",
            lambda self, feed, cache, honest=honest, sign=sign: nearly_tied(
                honest(self, feed, cache), sign
            ),
        )
    own = ask_torch(questions[:1])
    report = run(tiny_bundle, own, levels=("token",))
    assert level_of(report, "token").figures["equal"] == 0
    assert level_of(report, "token").figures["ties"] == int(passes)
    assert report.passed is passes


def test_what_cannot_run_here_is_told_and_fails_only_where_required(tiny_bundle, truth):
    report = run(tiny_bundle, truth, backends=("ort", "trt"), levels=("token",))
    assert report.passed
    not_run = level_of(report, "token", backend=2)
    assert not_run.status == "not_run" and "the bundle holds no engines" in not_run.reason
    assert not report.backends[2].was_run and not report.backends[2].name

    report = run(tiny_bundle, truth, required=("trt",), levels=("token",))
    assert [backend.backend for backend in report.backends] == ["ort", "ort", "trt"]
    assert not report.passed
    # What is required and not run is not made up for by its graphs' ids.
    report = run(tiny_bundle, truth, backends=("trt",), required=("trt",))
    assert not report.passed and set(statuses(report).values()) == {"not_run"}


def test_a_dtype_without_a_tolerance_is_not_run(engine_bundle, truth, monkeypatch):
    device = use_fakes(monkeypatch)
    report = run(engine_bundle("bfloat16"), truth, backends=("trt",))
    assert set(statuses(report).values()) == {"not_run"} and not report.passed
    assert "not been measured for this dtype: bfloat16" in level_of(report, "tensor").reason
    # What had been loaded was freed.
    assert device.is_clean


def test_damaged_engines_are_refused_and_not_merely_not_run(
    engine_bundle, truth, tmp_path, monkeypatch
):
    use_fakes(monkeypatch)
    damaged = tmp_path / "bundle"
    shutil.copytree(engine_bundle("float32"), damaged)
    engine = next(damaged.glob("engines/*/decoder_model_merged.engine"))
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError):
        run(damaged, truth, backends=("ort", "trt"))


def test_a_golden_stands_for_pytorch(tiny_bundle, engine_bundle, truth, tmp_path, monkeypatch):
    opened = open_bundle(tiny_bundle, verify="full")
    folder = record_truth(opened, truth, tmp_path / "golden")
    golden = GoldenTruth(open_golden(folder, opened.manifest))
    report = run(tiny_bundle, golden)
    assert report.passed and statuses(report) == ALL_PASSED
    assert report.reference.startswith("golden of PyTorch")
    assert report.questions == 3
    again = run(tiny_bundle, truth)
    # Whether PyTorch agrees with itself was asked before the golden was recorded.
    assert outputs(report) == [row for row in outputs(again) if row.tensor != "logits (cached)"]

    # Of another dtype, it has nothing to say of these engines.
    use_fakes(monkeypatch)
    report = run(engine_bundle("float16"), golden, backends=("ort", "trt"))
    assert report.passed
    assert "float16" in level_of(report, "tensor", backend=-1).reason
    with pytest.raises(UsageError, match="layers can be compared with PyTorch alone"):
        run(tiny_bundle, golden, per_layer=True)

    double_logits(monkeypatch)
    report = run(tiny_bundle, golden, levels=("tensor",))
    assert "a golden does not hold what is inside" in level_of(report, "tensor").reason


def test_a_golden_for_tensorrt_needs_graphs_for_it(tiny_bundle, truth, tmp_path):
    opened = open_bundle(tiny_bundle, verify="full")
    with pytest.raises(UsageError, match="no graphs for TensorRT"):
        record_truth(opened, truth, tmp_path / "golden", backend="trt")
    assert list(tmp_path.iterdir()) == []


def test_layers_are_compared_where_they_are_asked_for(tiny_bundle, truth):
    report = run(tiny_bundle, truth, levels=("tensor",), per_layer=True)
    assert report.passed
    layers = [row for row in level_of(report, "tensor").rows if row.module]
    assert {row.component for row in layers} == {
        "vision_encoder", "embed_tokens", "decoder_model_merged",
    }  # fmt: skip
    assert all(row.passed and row.calls == 1 for row in layers)
    assert level_of(report, "tensor").figures["layers"] == len(layers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": ()}, "nothing to check"),
        ({"backends": ()}, "nothing to check"),
        ({"fail_under": {"tensor": 0.5}}, "tensor=0.5"),
        ({"fail_under": {"positions": 1.0}}, "positions=1"),
        ({"fail_under": {"token": 1.5}}, "token=1.5"),
        ({"fail_under": {"token": float("nan")}}, "token=nan"),
        ({"fail_under": {"task": 0.5}, "levels": ("token",)}, "not asked for"),
        ({"per_layer": True, "levels": ("token",)}, "not asked for"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_bundle, truth, options, words):
    with pytest.raises(UsageError, match=words):
        run(tiny_bundle, truth, **options)


def test_no_questions_is_refused(tiny_bundle, ask_torch):
    with pytest.raises(UsageError, match="at least 1"):
        run(tiny_bundle, ask_torch([]))
    with pytest.raises(UsageError, match="at least 1"):
        run(tiny_bundle, None)


def test_an_image_that_cannot_be_read_is_an_error_and_no_finding(tiny_bundle, ask_torch, tmp_path):
    missing = Question(image=tmp_path / "missing.png", expression="the red circle")
    with pytest.raises(ImageError):
        run(tiny_bundle, ask_torch([missing]))


def test_no_true_box_leaves_the_task_out(tiny_bundle, ask_torch, questions):
    plain = [Question(image=questions[0].image, expression=questions[0].expression)]
    own = ask_torch(plain)
    report = run(tiny_bundle, own, levels=("task",))
    assert statuses(report) == {"task": "not_run"} and not report.passed
