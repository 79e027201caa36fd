"""The check passes on an honest bundle, and each level fails on what it is for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import BundleError, GapExportError, ImageError, ParityError, UsageError
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.parity import check as check_module
from gap_export.parity.check import check_bundle, needs_reference
from gap_export.parity.golden import open_golden
from gap_export.parity.inside.look import Inside
from gap_export.parity.question import Question
from gap_export.parity.record import record_truth
from gap_export.parity.results import LEVELS
from gap_export.parity.truth import GoldenTruth, TorchTruth
from gap_export.runtime import generation
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.spec.manifest import EngineLimits
from gap_export.spec.tolerances import TOLERANCES
from tests.parity import mutants
from tests.parity.checking import failed_outputs, level_of, outputs, statuses
from tests.runtime.backends.fake_tensorrt import copy_bundle, use_fakes, write_engines

LIMITS = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=1, max_images=1)
ALL_PASSED = dict.fromkeys(LEVELS, "passed")
DECODER = {"logits (prefill)", "logits (decode)", "logits (padded batch)"}


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(0)
    texts = ["the red circle", "the big blue square", "object"]
    return [
        Question(
            image=rng.integers(0, 256, (40, 32, 3), dtype=np.uint8),
            expression=text,
            box=(0.0, 0.0, 16.0, 20.0),
        )
        for text in texts
    ]


@pytest.fixture(scope="module")
def ask_torch(tiny_recipe, tiny_checkpoint):
    """A reference for some questions."""
    return partial(TorchTruth, tiny_recipe, Checkpoint.of(tiny_checkpoint))


@pytest.fixture(scope="module")
def truth(ask_torch, questions):
    """Asked once for all tests that do not change it."""
    return ask_torch(questions)


@pytest.fixture
def blind(monkeypatch):
    """Where a difference begins is not looked for."""
    monkeypatch.setattr(check_module, "look_inside", lambda *_, **__: Inside())


def run(bundle, reference, **options):
    report = check_bundle(open_bundle(bundle, verify="full"), reference=reference, **options)
    json.dumps(report.to_plain(), allow_nan=False)
    return report


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
    assert report.passed and len(report.backends) == 2
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
    not_run = level_of(report, "token", backend=1)
    assert not_run.status == "not_run" and "the bundle holds no engines" in not_run.reason
    assert not report.backends[1].was_run and not report.backends[1].name

    report = run(tiny_bundle, truth, required=("trt",), levels=("token",))
    assert [backend.backend for backend in report.backends] == ["ort", "trt"]
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
    assert "float16" in level_of(report, "tensor", backend=1).reason
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


def _keys_for_values(values):
    key, value = "past_key_values.0.key", "past_key_values.0.value"
    values[key], values[value] = values[value], values[key]


def _another_layers(values):
    values["past_key_values.1.key"] = values["past_key_values.0.key"]


def _heads_turned(values):
    values["past_key_values.0.key"] = values["past_key_values.0.key"].flip(1)


@pytest.mark.parametrize("spoil", [_keys_for_values, _another_layers, _heads_turned, None])
def test_a_reference_that_decodes_wrongly_from_its_cache_is_noticed(
    tiny_bundle, ask_torch, questions, monkeypatch, tmp_path, spoil
):
    """What is compared step by step would be wrong on both sides alike."""
    honest = TorchBackend.decode

    def decode(self, feed, cache):
        if spoil is None and cache.length:
            # Ids that a step does not read.
            feed = {**feed, "position_ids": np.zeros_like(feed["position_ids"])}
        logits = honest(self, feed, cache)
        if spoil is not None:
            spoil(cache.values)
        return logits

    monkeypatch.setattr(TorchBackend, "decode", decode)
    truth = ask_torch(questions[:1])
    report = run(tiny_bundle, truth, levels=("tensor",))
    assert "logits (cached)" in failed_outputs(report)
    with pytest.raises(ParityError, match="decoding with a cache is not its prefill without"):
        record_truth(open_bundle(tiny_bundle), truth, tmp_path / "golden")


def _renumbered(kept):
    return np.arange(len(kept))


def _shifted_image(kept):
    is_image = (kept > 5) & (kept < kept[-1] - 5)
    return np.where(is_image, kept - 1, kept)


def _reversed_image(kept):
    return np.concatenate([kept[:8], kept[8:11][::-1], kept[11:]])


@pytest.mark.parametrize("spoil", [_renumbered, _shifted_image, _reversed_image])
def test_wrong_ids_fed_to_both_sides_are_noticed(
    tiny_bundle, tiny_recipe, tiny_checkpoint, questions, monkeypatch, tmp_path, spoil
):
    """PyTorch and the bundle are fed by one session, so that no other level can tell."""
    honest = generation.build_kept_positions
    monkeypatch.setattr(generation, "build_kept_positions", lambda **given: spoil(honest(**given)))
    truth = TorchTruth(tiny_recipe, Checkpoint.of(tiny_checkpoint), questions[:1])
    report = run(tiny_bundle, truth, levels=("positions", "tensor", "token"))
    assert statuses(report) == {"positions": "failed", "tensor": "passed", "token": "passed"}
    assert "counted by hand" in level_of(report, "positions").reason
    with pytest.raises(ParityError, match="counted by hand"):
        record_truth(open_bundle(tiny_bundle), truth, tmp_path / "golden")


def _mask_ignored(decode, self, feed, cache):
    return decode(self, {**feed, "attention_mask": np.ones_like(feed["attention_mask"])}, cache)


def _rows_mixed(decode, self, feed, cache):
    return decode(self, feed, cache)[::-1]


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("spoil", [_mask_ignored, _rows_mixed])
def test_a_decoder_that_is_right_for_one_row_alone_is_noticed(
    tiny_bundle, truth, monkeypatch, spoil
):
    honest = OnnxRuntimeBackend.decode
    monkeypatch.setattr(OnnxRuntimeBackend, "decode", lambda *given: spoil(honest, *given))
    report = run(tiny_bundle, truth, levels=("tensor", "token"))
    assert failed_outputs(report).keys() == {"logits (padded batch)"}
    assert level_of(report, "token").figures["equal"] == report.questions


def _other_tokenizer(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"red"', '"rad"'))


def _decoder(**changes):
    return lambda m: replace(m, decoder=replace(m.decoder, **changes))


FACTS = {
    "tokenizer": ({"edit_folder": _other_tokenizer}, "tokenizer.json is not the tokenizer that"),
    "end of an answer": (
        {"edit_manifest": _decoder(eos_token_ids=(7,))},
        "gap.json says decoder.eos_token_ids is [7], and recipe and checkpoint give",
    ),
    "context": (
        {"edit_manifest": _decoder(max_position_embeddings=9999)},
        "decoder.max_position_embeddings is 9999, and recipe and checkpoint give",
    ),
}


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("level", ["tensor", "box"])
@pytest.mark.parametrize("name", FACTS)
def test_what_the_bundle_says_of_its_model_is_held_against_the_checkpoint(
    tiny_bundle, ask_torch, truth, tmp_path, name, level
):
    edits, words = FACTS[name]
    bundle = mutants.rewrite(tiny_bundle, tmp_path / "wrong", **edits)
    fresh = ask_torch(truth.questions)
    report = run(
        bundle,
        fresh,
        levels=("positions", level),
        fail_under={} if level == "tensor" else {"box": 0.0},
    )
    assert statuses(report)[level] == "failed" and words in level_of(report, level).reason
    with pytest.raises(ParityError, match="wrong already"):
        record_truth(open_bundle(bundle), fresh, tmp_path / "golden")
