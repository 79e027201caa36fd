"""Floats that no answer can be read from are refused, wherever they leave a graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from gap_export.errors import ComputationError
from gap_export.runtime.computed import check_computed, choose_tokens
from gap_export.runtime.session import GroundingSession
from tests.parity.mutants import add_constant, rewrite_graph
from tests.runtime.fake_backends import EditedBackend

INF, NAN = np.inf, np.nan
IMAGE = np.random.default_rng(3).integers(0, 255, (40, 40, 3)).astype(np.uint8)
HALF, SINGLE = np.float16, np.float32


@pytest.mark.parametrize(
    ("row", "dtype", "seen"),
    [
        ([0, INF, 1], SINGLE, "inf for token 1, row 1, at step 3"),
        ([0, INF, INF], SINGLE, "inf for token 1, row 1"),
        ([0, 1, INF], HALF, "inf for token 2, row 1"),
        ([INF, 1, 0], SINGLE, "inf for token 0, row 1"),
        ([0, 65504, 1], HALF, "65504 for token 1, row 1"),
        ([0, 1, NAN], SINGLE, "nan for token 2, row 1"),
        ([INF, 1, NAN], HALF, "nan for token 2, row 1"),
        ([-INF, -INF, -INF], SINGLE, "-inf for token 0, row 1"),
        ([-65504, -65504, -65504], HALF, "-65504 for token 0, row 1"),
        ([0, 0, 0], SINGLE, "0 for each of 3 tokens, row 1"),
        ([7, 7, 7], HALF, "7 for each of 3 tokens, row 1"),
        ([0, 0, 0, -INF], SINGLE, "0 for each of 3 tokens, row 1"),
        ([-INF, 2, 2, 2], SINGLE, "2 for each of 3 tokens, row 1"),
        ([-65504, -3, -3, -3], HALF, "-3 for each of 3 tokens, row 1"),
    ],
)
def test_logits_that_choose_nothing_are_refused(row, dtype, seen):
    logits = np.array([range(len(row)), row], dtype=dtype)
    with pytest.raises(ComputationError, match=f"logits that cannot be right: {seen}.*float32"):
        choose_tokens(logits, step=3)


@pytest.mark.parametrize(
    ("row", "token"),
    [
        ([-INF, 2, -INF], 1),  # a masked vocabulary
        ([0, -INF, -INF], 0),
        ([5, 5, 4], 0),  # a tie goes to the lower id
        ([0, 4, 4], 1),
        ([-INF, 4, 4], 1),
        ([4, -INF, 4, -INF], 0),
        ([-3, -2, -4], 1),
        ([65472, 1, 0], 0),  # the last but one of float16
    ],
)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_logits_that_choose_are_taken(row, token, dtype):
    assert choose_tokens(np.array([row], dtype=dtype), step=0).tolist() == [token]


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(
    ("value", "is_wrong"), [(INF, True), (-INF, True), (NAN, True), (-NAN, True), (65472, False)]
)
def test_one_number_that_is_not_finite_is_found(dtype, value, is_wrong):
    values = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    # As views do it: neither contiguous nor at the start of their memory.
    values = values.transpose(0, 2, 1)
    values[1, 2, 0] = value
    refused = pytest.raises(ComputationError, match=r"tower gives it .*\[\d, 2, 0\]")
    for output in (values, values[1:]):
        with refused if is_wrong else nullcontext():
            check_computed(output, graph="tower", output="it")


def test_a_constant_row_is_found_where_it_cannot_be():
    values = np.arange(24, dtype=HALF).reshape(2, 12)
    values[1] = 0
    with pytest.raises(ComputationError, match="0 everywhere, in row 1"):
        check_computed(values, graph="text_encoder", output="text_embeds")
    check_computed(values, graph="text_encoder", output="text_embeds", may_be_constant=True)


def spoilt_at_the_end(value: float) -> Callable[[Any], Any]:
    def spoil(values: Any) -> Any:
        values[..., -1] = value
        return values

    return spoil


def is_refused(session: GroundingSession, output: str, spoil: Callable[[Any], Any]) -> str:
    session.backend = EditedBackend(session.backend, output, spoil)
    with pytest.raises(ComputationError, match=f"gives {output} that cannot be right") as caught:
        session.ground_batch(IMAGE, ["the star", "blue square"])
    return str(caught.value)


@pytest.mark.parametrize("spoil", [spoilt_at_the_end(INF), spoilt_at_the_end(NAN), np.zeros_like])
@pytest.mark.parametrize("output", ["text_embeds", "inputs_embeds", "image_features", "logits"])
def test_every_output_of_a_session_is_looked_at(text_manifest, make_session, output, spoil):
    is_refused(make_session(text_manifest), output, spoil)


@pytest.mark.parametrize("output", ["image_features", "image_newline"])
def test_tiles_are_looked_at(tiled_manifest, make_session, output):
    is_refused(make_session(tiled_manifest), output, spoilt_at_the_end(-INF))


@pytest.mark.parametrize(
    ("output", "graph"),
    [
        ("token_scores", "vision_encoder"),
        ("patch_features", "vision_encoder"),
        ("image_features", "token_pruner"),
    ],
)
def test_what_an_adaptive_budget_reads_is_looked_at(tiny_checkpoint, exports, output, graph):
    bundle = exports.bundle(model=str(tiny_checkpoint), pruner="trim")
    with GroundingSession.open(bundle, num_threads=1) as session:
        assert graph in is_refused(session, output, spoilt_at_the_end(INF))


def test_scores_that_are_all_equal_keep_the_lowest_indices(tiny_checkpoint, exports):
    bundle = exports.bundle(model=str(tiny_checkpoint), pruner="trim")
    with GroundingSession.open(bundle, num_threads=1) as session:
        session.backend = EditedBackend(session.backend, "token_scores", np.zeros_like)
        kept = session.ground(IMAGE, "the star").keep_indices
    # One, and the mean of the others.
    assert kept == (0, 15)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.full)])
def test_a_decoder_that_overflows_is_refused_by_ground_and_fails_the_check(
    tiny_checkpoint, tiny_recipe, exports, tmp_path, run_ground, dtype
):
    from gap_export.checkpoint.find.source import Checkpoint
    from gap_export.parity.question import Question
    from tests.parity.checking import check_with_torch, statuses

    def overflow(model: Any) -> None:
        (node,) = (one for one in model.graph.node if "logits" in one.output)
        node.output[0] = "small_logits"
        # The largest logits of each row are far beyond what the dtype holds.
        by = np.array(6e4 if dtype == "float16" else 3e38, dtype)
        add_constant(model, "factor", by)
        model.graph.node.append(
            helper.make_node("Mul", ["small_logits", "factor"], ["scaled_logits"])
        )
        model.graph.node.append(helper.make_node("Mul", ["scaled_logits", "factor"], ["logits"]))

    whole = exports.bundle(
        model=str(tiny_checkpoint), pruner="spatial", keep_ratio=0.3,
        **({} if dtype == "float32" else {"dtype": dtype}),
    )  # fmt: skip
    bundle = rewrite_graph(whole, tmp_path / "bundle", "decoder_model_merged", overflow)
    code, err = run_ground(bundle)
    assert code == 1
    assert "error: decoder_model_merged gives logits that cannot be right: inf for token" in err
    questions = [Question(image=IMAGE, expression="the star")]
    found = check_with_torch(bundle, tiny_recipe, Checkpoint.of(tiny_checkpoint), questions)
    assert (statuses(found)["tensor"], statuses(found)["token"]) == ("failed", "failed")
    assert not found.passed  # which is exit code 3


@pytest.fixture
def run_ground(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    from PIL import Image

    from gap_export.cli import main

    def run(bundle: Path) -> tuple[int, str]:
        Image.fromarray(IMAGE).save(tmp_path / "scene.png")
        scene = str(tmp_path / "scene.png")
        code = main(["ground", str(bundle), scene, "the star", "--form", "base"])
        return code, capsys.readouterr().err

    return run
