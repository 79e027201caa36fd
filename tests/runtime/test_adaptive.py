"""Sessions of bundles in which each picture decides how many of its tokens are kept."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import BundleError, UsageError
from gap_export.manifest import EngineLimits
from gap_export.parity.question import Question
from gap_export.runtime.backend import EncodedImage
from gap_export.runtime.budget import count_outliers
from gap_export.runtime.session import GroundingSession
from gap_export.source import Checkpoint
from tests.parity.checking import check_with_torch, outputs
from tests.runtime.fake_tensorrt import copy_bundle, use_fakes, write_engines

EXPRESSIONS = ["the star", "a small red circle", "the big object left of a square", "blue"]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, exports):
    """TRIM as published: the number is that of the outliers, with the mean of the others."""
    return exports.bundle(model=str(tiny_checkpoint), pruner="trim")


def picture(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 40, 3)).astype(np.uint8)


def test_the_manifest_says_what_numbers_there_may_be(bundle):
    manifest = open_bundle(bundle).manifest
    pruning = manifest.pruning
    assert (pruning.budget, pruning.extra_token, pruning.keep_ratio) == ("adaptive", "mean", 1.0)
    assert pruning.kept_buckets == tuple(range(1, 16)) and pruning.num_kept_tokens == 15
    graph = manifest.graph("token_pruner")
    assert (graph.inputs[0].name, graph.inputs[0].shape) == ("num_kept_tokens", (1,))
    outputs = {value.name for value in manifest.graph("vision_encoder").outputs}
    assert outputs == {"token_scores", "patch_features"}


def test_each_row_keeps_its_own_number_and_padding_changes_nothing(bundle):
    with GroundingSession.open(bundle, num_threads=1) as session:
        for seed in range(4):
            together = session.ground_batch(picture(seed), EXPRESSIONS)
            alone = [session.ground(picture(seed), text) for text in EXPRESSIONS]
            numbers = {len(answer.keep_indices) for answer in together}
            for one, other in zip(together, alone, strict=True):
                assert one.keep_indices == other.keep_indices
                assert one.token_ids == other.token_ids
            if len(numbers) > 1:
                return
    pytest.fail("no picture gave rows of different numbers: the test shows nothing")


def test_as_many_survive_as_stand_out(bundle):
    with GroundingSession.open(bundle, num_threads=1) as session:
        answer = session.ground(picture(), EXPRESSIONS[0])
    (grid,) = answer.tokens
    scores = np.array(grid.scores)
    wanted = max(1, int(count_outliers(scores[None])[0]))
    best = np.sort(np.argsort(-scores, kind="stable")[:wanted])
    assert grid.kept == tuple(best.tolist())
    # The extra token is fed as well, at the last visual token's place.
    assert answer.keep_indices == (*grid.kept, 15)


def test_parity_holds_through_both_graphs(bundle, tiny_checkpoint, tiny_recipe):
    report = check_with_torch(
        bundle,
        tiny_recipe,
        Checkpoint.of(tiny_checkpoint),
        [Question(image=picture(n), expression=EXPRESSIONS[n]) for n in range(3)],
    )
    assert report.passed, report.to_plain()
    compared = {(row.component, row.tensor) for row in outputs(report)}
    assert {("vision_encoder", "token_scores"), ("token_pruner", "keep_indices")} <= compared


def test_engines_take_the_number_from_the_host(bundle, tmp_path, monkeypatch):
    device = use_fakes(monkeypatch)
    copied = copy_bundle(bundle, tmp_path / "bundle")
    limits = EngineLimits(max_prompt=40, max_new_tokens=8, max_batch=4, max_images=4)
    write_engines(copied, limits)
    with (
        GroundingSession.open(copied.path, backend="tensorrt") as session,
        GroundingSession.open(bundle, num_threads=1) as reference,
    ):
        for seed in range(2):
            found = session.ground_batch(picture(seed), EXPRESSIONS)
            wanted = reference.ground_batch(picture(seed), EXPRESSIONS)
            assert [f.keep_indices for f in found] == [w.keep_indices for w in wanted]
            assert [f.token_ids for f in found] == [w.token_ids for w in wanted]
        scored = session.backend.score_tokens(np.zeros((1, 3, 32, 32), np.float32), embeds())
        with pytest.raises(UsageError, match=r"num_kept_tokens is beyond .*16.*1\.\.15"):
            session.backend.prune_tokens(scored, num_kept_tokens=16)
    assert device.memory == {}


def embeds() -> np.ndarray:
    return np.ones((1, 16), np.float32)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda keep: keep[:, ::-1], "before"),
        (lambda keep: keep * 0, "0 more than once"),
        (lambda keep: keep + 16, "0..15"),
    ],
)
def test_a_graph_that_keeps_what_it_should_not_is_refused(tiny_bundle, monkeypatch, wrong, says):
    with GroundingSession.open(tiny_bundle, num_threads=1) as session:
        encode = session.backend.encode_image

        def spoilt(*given):
            encoded = EncodedImage(*encode(*given))
            return encoded._replace(keep_indices=wrong(encoded.keep_indices))

        monkeypatch.setattr(session.backend, "encode_image", spoilt)
        with pytest.raises(BundleError, match="pruner spatial of this bundle does not") as caught:
            session.ground(picture(), EXPRESSIONS[0])
    assert says in str(caught.value)
