"""Sessions of bundles whose kept tokens count as often as there were tokens for them."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import UsageError
from gap_export.exporting import ExportOptions, export_model
from gap_export.families.common.components import decoder_component
from gap_export.families.common.decoder_kind import DecoderKind
from gap_export.parity.question import Question
from gap_export.runtime.session import GroundingSession
from gap_export.spec.requests import PruningRequest
from tests.parity.checking import check_with_torch, statuses
from tests.parity.mutants import DECODER, rewrite_graph

EXPRESSIONS = ["the star", "a small red circle above the star"]


def masks(session: GroundingSession, image: Any, expressions: list[str]) -> list[np.ndarray]:
    """What the decoder is fed as its mask at the first call, a row an expression."""
    seen: list[np.ndarray] = []
    honest: Any = session.backend.decode

    def decode(feed: Any, cache: Any) -> Any:
        seen.append(feed["attention_mask"])
        return honest(feed, cache)

    session.backend.decode = decode  # type: ignore[method-assign]
    session.ground_batch(image, expressions)
    return list(seen[0])


@pytest.mark.parametrize("kind", ["sample", "tiled", "stacked"])
def test_a_pruned_prompt_weighs_as_much_as_the_unpruned_one(request, kind, make_session, image):
    manifest = request.getfixturevalue(f"{kind}_manifest")
    pruning = dataclasses.replace(manifest.pruning, attention="proportional")
    session = make_session(dataclasses.replace(manifest, pruning=pruning))
    (mask,) = masks(session, image, EXPRESSIONS[:1])
    answer = session.ground(image, EXPRESSIONS[0])
    text = session._prompts.encode(EXPRESSIONS[0])
    words = len(text.prefix_ids) + len(text.suffix_ids)
    assert len(mask) == words + len(answer.keep_indices)
    assert mask.sum() == words + answer.num_visual_tokens > len(mask)
    visual = mask[len(text.prefix_ids) : len(mask) - len(text.suffix_ids)]
    if kind == "tiled":
        # Of newlines none is dropped: they are those whose index ends a row of joined tiles.
        tokens = session.ground(image, EXPRESSIONS[0]).tokens
        num_patches = sum(len(grid.kept) for grid in tokens)
        assert (visual == 1).sum() == len(visual) - num_patches > 0
        visual = visual[visual > 1]
    assert visual.min() >= 1 and np.ptp(visual) <= 1
    (plain,) = masks(make_session(manifest), image, EXPRESSIONS[:1])
    assert set(plain.tolist()) == {1}


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, exports) -> dict[str, Any]:
    """One model, exported both ways."""
    options = {"model": str(tiny_checkpoint), "pruner": "spatial", "keep_ratio": 0.3}
    return {
        attention: exports.bundle(**options, attention=attention)
        for attention in ("plain", "proportional")
    }


def test_graphs_and_manifest_tell_the_two_apart(bundles):
    plain, weighed = (open_bundle(path).manifest for path in bundles.values())
    assert weighed.pruning.attention == "proportional"
    # A bundle as it was before there was a choice says nothing of it.
    said = json.loads((bundles["plain"] / "gap.json").read_text())["pruning"]
    assert "attention" not in said and "positions" in said
    hashes = [{f.path: f.sha256 for f in m.files} for m in (plain, weighed)]
    differing = {path for path in hashes[0] if hashes[0][path] != hashes[1][path]}
    assert differing == {"decoder_model_merged.onnx", "decoder_model_merged_ort_fp32.onnx"}


def test_all_forms_answer_alike_alone_and_together(bundles):
    image = np.random.default_rng(3).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    answers = {}
    for form in ("base", "ort"):
        with GroundingSession.open(bundles["proportional"], num_threads=1, form=form) as session:
            # Together they share a beginning, alone there is none.
            together = session.ground_batch(image, EXPRESSIONS * 4)
            alone = [session.ground(image, text) for text in EXPRESSIONS]
        assert [a.token_ids for a in together[:2]] == [a.token_ids for a in alone]
        answers[form] = [answer.token_ids for answer in alone]
    assert answers["base"] == answers["ort"]


def test_the_check_passes_and_sees_a_decoder_that_ignores_what_tokens_count_as(
    bundles, tiny_checkpoint, tiny_recipe, tmp_path
):
    def ignore(model: Any) -> None:
        (log,) = (node for node in model.graph.node if node.op_type == "Log")
        log.op_type, log.input[:] = "Sub", [log.input[0]] * 2

    rng = np.random.default_rng(0)
    questions = [
        Question(image=rng.integers(0, 255, (40, 40, 3)).astype(np.uint8), expression=text)
        for text in EXPRESSIONS
    ]
    deaf = rewrite_graph(bundles["proportional"], tmp_path / "deaf", DECODER, ignore)
    for bundle, passes in ((bundles["proportional"], True), (deaf, False)):
        report = check_with_torch(bundle, tiny_recipe, Checkpoint.of(tiny_checkpoint), questions)
        assert report.passed == passes
    assert statuses(report)["tensor"] == "failed"
    # The other form is a graph of its own, which nobody changed.
    assert statuses(report, 1)["tensor"] == "passed"


def test_a_table_of_ids_in_the_graph_is_refused_with_it(tiny_checkpoint, tmp_path):
    options = ExportOptions(
        model=str(tiny_checkpoint),
        pruning=PruningRequest(pruner="spatial", keep_ratio=0.3, attention="proportional"),
        bake_positions=True,
        out=tmp_path / "out",
    )
    with pytest.raises(UsageError, match="--attention plain"):
        export_model(options)
    assert not (tmp_path / "out").exists()


def test_a_decoder_of_another_make_is_refused(tmp_path):
    class Other(torch.nn.Module):
        pass

    source: Any = SimpleNamespace(architecture=SimpleNamespace(decoder=None))
    kind = DecoderKind(module=lambda _: Other())
    with pytest.raises(UsageError, match="no proportional attention"):
        decoder_component(source, kind, dtype="float32", attention="proportional")
