"""The check passes on an honest bundle and fails, with its exit code, on a wrong one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from gap_export.errors import UsageError
from gap_export.manifest import EngineLimits
from gap_export.parity.check import Question, _Answer, check_bundle
from gap_export.parity.tolerances import TOLERANCES
from gap_export.parity.torch_backend import TorchBackend
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.source import Checkpoint
from tests.runtime.fake_tensorrt import copy_bundle, use_fakes, write_engines


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(0)
    texts = ["the red circle", "the big blue square", "object"]
    return [
        Question(image=rng.integers(0, 256, (40, 32, 3), dtype=np.uint8), expression=text)
        for text in texts
    ]


def run(bundle, recipe, checkpoint, questions):
    return check_bundle(
        bundle, recipe=recipe, checkpoint=Checkpoint.of(checkpoint), questions=questions
    )


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_text_bundle"])
def test_an_honest_bundle_passes(fixture, tiny_recipe, tiny_checkpoint, questions, request):
    bundle = request.getfixturevalue(fixture)
    report = run(bundle, tiny_recipe, tiny_checkpoint, questions)
    assert report.passed, report.to_plain()
    assert report.equal_tokens == report.equal_boxes == report.num_questions == 3
    outputs = {row.output for row in report.outputs}
    assert {"image_features", "keep_indices", "logits (prefill)", "logits (decode)"} <= outputs
    json.dumps(report.to_plain(), allow_nan=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_engines_are_compared_with_pytorch_in_their_own_dtype(
    tiny_bundle, tiny_recipe, tiny_checkpoint, questions, tmp_path, monkeypatch, dtype
):
    bundle = copy_bundle(tiny_bundle, tmp_path / "bundle")
    limits = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=1, max_images=1)
    write_engines(bundle, limits, dtype=dtype)
    use_fakes(monkeypatch)
    report = check_bundle(
        bundle.path,
        recipe=tiny_recipe,
        checkpoint=Checkpoint.of(tiny_checkpoint),
        questions=questions,
        backend="tensorrt",
    )
    assert report.candidate == f"TensorRT 10.16.0 (Fake GPU, desktop-sm89, {dtype})"
    assert report.passed, report.to_plain()
    (features,) = [row for row in report.outputs if row.output == "image_features"]
    tolerance = TOLERANCES[dtype]["image_features"]
    assert features.atol == pytest.approx(
        tolerance.atol + tolerance.share * features.max_abs_reference
    )


def test_a_dtype_without_a_tolerance_is_refused(
    tiny_bundle, tiny_recipe, tiny_checkpoint, questions, tmp_path, monkeypatch
):
    bundle = copy_bundle(tiny_bundle, tmp_path / "bundle")
    limits = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=1, max_images=1)
    write_engines(bundle, limits, dtype="bfloat16")
    use_fakes(monkeypatch)
    with pytest.raises(UsageError, match=r"not been measured for this dtype: bfloat16"):
        check_bundle(
            bundle.path,
            recipe=tiny_recipe,
            checkpoint=Checkpoint.of(tiny_checkpoint),
            questions=questions,
            backend="tensorrt",
        )


@pytest.mark.parametrize(
    ("method", "spoil", "output"),
    [
        ("decode", lambda logits: logits * 2, "logits (prefill)"),
        ("decode", lambda logits: logits[:, ::-1].copy(), "logits (prefill)"),
        ("embed_tokens", lambda embeds: embeds + np.float32(1e-3), "inputs_embeds"),
        ("encode_image", lambda pair: (pair[0], pair[1][:, ::-1].copy()), "keep_indices"),
        ("encode_image", lambda pair: (pair[0] * np.float32(np.nan), pair[1]), "image_features"),
    ],
    ids=["doubled", "permuted", "shifted", "order", "nan"],
)
def test_a_wrong_candidate_fails_in_the_output_that_is_wrong(
    tiny_bundle, tiny_recipe, tiny_checkpoint, questions, monkeypatch, method, spoil, output
):
    honest = getattr(OnnxRuntimeBackend, method)

    def wrong(self, *args, **kwargs):
        return spoil(honest(self, *args, **kwargs))

    monkeypatch.setattr(OnnxRuntimeBackend, method, wrong)
    report = run(tiny_bundle, tiny_recipe, tiny_checkpoint, questions[:1])
    assert not report.passed
    assert output in {row.output for row in report.outputs if not row.passed}
    json.dumps(report.to_plain(), allow_nan=False)


def test_compact_positions_fed_to_the_graph_fail(
    tiny_bundle, tiny_recipe, tiny_checkpoint, questions, monkeypatch
):
    honest = OnnxRuntimeBackend.decode

    def compact(self, *, kept_positions, **given):
        table = np.broadcast_to(np.arange(kept_positions.shape[1]), kept_positions.shape)
        return honest(self, kept_positions=np.ascontiguousarray(table), **given)

    monkeypatch.setattr(OnnxRuntimeBackend, "decode", compact)
    report = run(tiny_bundle, tiny_recipe, tiny_checkpoint, questions[:1])
    failed = [row for row in report.outputs if not row.passed]
    assert {row.output for row in failed} == {"logits (prefill)", "logits (decode)"}
    assert all(row.max_abs_diff > 100 * row.atol for row in failed)


def test_tokens_that_differ_fail_even_where_tensors_agree(
    tiny_bundle, tiny_recipe, tiny_checkpoint, questions
):
    report = run(tiny_bundle, tiny_recipe, tiny_checkpoint, questions)
    assert report.passed
    assert not replace(report, equal_tokens=2).passed
    assert not replace(report, equal_boxes=0).passed
    # A tie explains one answer, and no more than that.
    assert replace(report, equal_tokens=2, equal_boxes=2, ties=1).passed
    assert not replace(report, equal_tokens=1, equal_boxes=2, ties=1).passed


@pytest.mark.parametrize(("gap", "passes"), [(1e-4, True), (1e-3, False)])
def test_a_flipped_token_is_a_tie_only_where_the_reference_is_undecided(
    tiny_bundle, tiny_recipe, tiny_checkpoint, questions, monkeypatch, gap, passes
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
            lambda self, honest=honest, sign=sign, **given: nearly_tied(
                honest(self, **given), sign
            ),
        )
    report = run(tiny_bundle, tiny_recipe, tiny_checkpoint, questions[:1])
    assert report.equal_tokens == 0
    assert report.ties == int(passes)
    assert report.passed is passes


def test_no_questions_is_refused(tiny_bundle, tiny_recipe, tiny_checkpoint):
    with pytest.raises(UsageError, match="at least 1"):
        run(tiny_bundle, tiny_recipe, tiny_checkpoint, [])


def answer(token_ids, keep_indices=(0, 3)):
    return Grounding(
        expression="x",
        box=None,
        text="",
        token_ids=token_ids,
        keep_indices=keep_indices,
        num_visual_tokens=16,
        tokens=(),
        image_size=(4, 4),
        timings_ms={},
        backend="numpy",
        warnings=(),
    )


def answers(expected, given, logits=()):
    return _Answer(expression="x", expected=expected, given=given, logits=list(logits))


def test_a_half_precision_margin_grows_with_the_logits():
    logits = [np.asarray([40.0, 39.5, 0.0], np.float16)]
    pair = answers(answer((0, 2)), answer((1, 2)), logits)
    assert pair.margin == 0.5
    assert pair.is_tie(TOLERANCES["float16"]["logits"])
    assert not pair.is_tie(TOLERANCES["float32"]["logits"])
    clear = answers(answer((0, 2)), answer((2, 2)), logits)
    assert not clear.is_tie(TOLERANCES["float16"]["logits"])
    assert not answers(answer((0, 2)), answer((0, 2)), logits).is_tie(
        TOLERANCES["float16"]["logits"]
    )


def test_answers_part_by_their_selection_only_where_it_differs():
    assert answers(answer((0, 2)), answer((1, 2), (0, 4))).saw_others
    assert not answers(answer((0, 2)), answer((1, 2))).saw_others
    # Another order of the same tokens is no other selection, and equal answers need no excuse.
    assert not answers(answer((0, 2)), answer((1, 2), (3, 0))).saw_others
    assert not answers(answer((0, 2)), answer((0, 2), (0, 4))).saw_others
