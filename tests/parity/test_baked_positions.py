"""A decoder that holds its position ids answers as one that is fed them, or is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import UsageError
from gap_export.exporting import ExportOptions, export_model
from gap_export.runtime.session import GroundingSession
from gap_export.spec.requests import EnginesRequest, PruningRequest
from tests.parity.checking import run, statuses

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
# Of different lengths: text behind the image counts on from the table, however long it is.
TEXTS = ["the red circle", "object"]


@pytest.fixture(scope="module")
def baked_bundle(tiny_checkpoint, exports):
    return exports.bundle(
        model=str(tiny_checkpoint), pruner="spatial", keep_ratio=0.3, bake_positions=True
    )


def test_the_decoder_has_one_input_less_and_the_manifest_says_what_it_holds(baked_bundle):
    manifest = open_bundle(baked_bundle).manifest
    decoders = [graph for graph in manifest.graphs if graph.component == "decoder_model_merged"]
    (decoder,) = decoders
    names = [value.name for value in decoder.inputs]
    assert "position_ids" in names and "kept_positions" not in names
    (table,) = manifest.pruning.baked_positions
    assert list(table) == sorted(table)
    # One entry for each token up to the first behind the image.
    assert table[-1] - len(table) + 1 == (
        manifest.pruning.num_visual_tokens - manifest.pruning.num_kept_tokens
    )


def test_it_answers_as_a_decoder_that_is_fed_its_positions(baked_bundle, tiny_bundle):
    answers = []
    for bundle in (baked_bundle, tiny_bundle):
        with GroundingSession.open(bundle) as session:
            alone = [session.ground(IMAGE, text).token_ids for text in TEXTS]
            together = [one.token_ids for one in session.ground_batch(IMAGE, TEXTS)]
            answers.append((alone, together))
    assert answers[0] == answers[1]


def test_the_check_passes(baked_bundle, ask_torch, questions, blind):
    report = run(baked_bundle, ask_torch(questions))
    assert report.passed, report.to_plain()


def test_the_check_finds_a_graph_that_holds_another_table(
    tiny_checkpoint, ask_torch, questions, blind, tmp_path, monkeypatch
):
    """The manifest says what it should hold; the graph counts from 0."""
    honest = "gap_export.exporting.export._table_of"
    monkeypatch.setattr(honest, lambda pruning: np.arange(len(pruning.baked_positions[0])))
    asked = ExportOptions(
        model=str(tiny_checkpoint),
        pruning=PruningRequest(pruner="spatial", keep_ratio=0.3),
        bake_positions=True,
        out=tmp_path / "b",
    )
    export_model(asked)
    report = run(tmp_path / "b", ask_torch(questions[:1]), levels=("positions", "tensor"))
    assert statuses(report) == {"positions": "failed", "tensor": "failed"}


def test_other_ids_than_those_it_holds_are_refused(baked_bundle):
    with (
        GroundingSession.open(baked_bundle, positions="compact") as session,
        pytest.raises(UsageError, match=r"holds its position ids.*without --bake-positions"),
    ):
        session.ground(IMAGE, TEXTS[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning": PruningRequest(pruner="cls")}, "which tokens this pruner keeps: cls; .*spat"),
        ({"pruning": PruningRequest(positions="compact")}, "re-numbered.*: compact"),
        ({"pruning": PruningRequest(extra_token="mean")}, "extra token stands.*: mean"),
        ({"engines": EnginesRequest(targets=("rtx",))}, "engines are run by our own sessions"),
    ],
)
def test_what_is_not_fixed_is_refused(tiny_checkpoint, tmp_path, options, message):
    pruning = options.pop("pruning", PruningRequest())
    if pruning.pruner is None:
        pruning = replace(pruning, pruner="spatial")
    asked = ExportOptions(
        model=str(tiny_checkpoint), pruning=pruning, bake_positions=True, out=tmp_path / "b",
        **options,
    )  # fmt: skip
    with pytest.raises(UsageError, match=message):
        export_model(asked)
    assert not (tmp_path / "b").exists()
