"""Sessions of bundles in which each image decides how many of its tokens are kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.bundle.files import HASH_NAME, hash_line
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.cli._describe import describe_tokens
from gap_export.engines.profiles import make_profiles
from gap_export.errors import BundleError, UsageError
from gap_export.parity.question import Question
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import MANIFEST_NAME, EngineLimits
from tests.parity.checking import check_with_torch, outputs
from tests.pruning import slow
from tests.runtime.backends.fake_tensorrt import copy_bundle, use_fakes, write_engines
from tests.runtime.fake_backends import EditedBackend

EXPRESSIONS = ["the star", "a small red circle", "the big object left of a square", "blue"]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, exports):
    """TRIM as published: the number is that of the outliers, with the mean of the others."""
    return exports.bundle(model=str(tiny_checkpoint), pruner="trim")


def image(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 40, 3)).astype(np.uint8)


def test_the_manifest_says_how_many_there_may_be(bundle):
    manifest = open_bundle(bundle).manifest
    pruning = manifest.pruning
    assert (pruning.budget, pruning.extra_token, pruning.keep_ratio) == ("adaptive", "mean", 1.0)
    assert pruning.kept_buckets == () and pruning.num_kept_tokens == 15
    graph = manifest.graph("token_pruner")
    assert (graph.inputs[0].name, graph.inputs[0].shape) == ("num_kept_tokens", (1,))
    outputs = {value.name for value in manifest.graph("vision_encoder").outputs}
    assert outputs == {"token_scores", "patch_features"}


def test_each_row_keeps_its_own_number_and_padding_changes_nothing(bundle):
    with GroundingSession.open(bundle, num_threads=1) as session:
        for seed in range(4):
            together = session.ground_batch(image(seed), EXPRESSIONS)
            alone = [session.ground(image(seed), text) for text in EXPRESSIONS]
            numbers = {len(answer.keep_indices) for answer in together}
            for one, other in zip(together, alone, strict=True):
                assert one.keep_indices == other.keep_indices
                assert one.token_ids == other.token_ids
            if len(numbers) > 1:
                return
    pytest.fail("no image gave rows of different numbers: the test shows nothing")


@pytest.mark.parametrize(
    ("pruner", "how"),
    [
        ("trim", {}),
        pytest.param("trim", {"keep_ratio": 0.1, "budget": "adaptive"}, marks=pytest.mark.full),
        ("prumerge", {}),
        pytest.param("prumerge-select", {}, marks=pytest.mark.full),
    ],
)
def test_exactly_as_many_survive_as_stand_out(exports, tiny_checkpoint, pruner, how):
    bundle = exports.bundle(model=str(tiny_checkpoint), pruner=pruner, **how)
    most = open_bundle(bundle).manifest.pruning.num_kept_tokens
    seen = set()
    with GroundingSession.open(bundle, num_threads=1) as session:
        for seed in range(6):
            for answer in session.ground_batch(image(seed), EXPRESSIONS[:2]):
                (grid,) = answer.tokens
                wanted = slow.outliers(grid.scores)
                assert grid.stood_out == wanted
                assert len(grid.kept) == min(max(wanted, 1), most)
                best = np.argsort(-np.array(grid.scores), kind="stable")[: len(grid.kept)]
                assert sorted(grid.kept) == sorted(best.tolist())
                assert grid.to_plain()["stood_out"] == wanted
                # The extra token is fed as well, at the last visual token's place.
                extra = () if pruner == "prumerge-select" else (15,)
                assert answer.keep_indices == (*grid.kept, *extra)
                seen.add(wanted)
    assert len(seen) > 1, "one number alone shows nothing"


def test_a_bundle_that_names_buckets_rounds_up_to_one_and_says_so(bundle, tmp_path):
    copied = copy_bundle(bundle, tmp_path / "bundle")
    pruning = dataclasses.replace(copied.manifest.pruning, kept_buckets=(6, 15))
    raw = dataclasses.replace(copied.manifest, pruning=pruning).to_json()
    (copied.path / MANIFEST_NAME).write_bytes(raw)
    (copied.path / HASH_NAME).write_bytes(hash_line(raw))
    with GroundingSession.open(copied.path, num_threads=1) as session:
        (grid,) = session.ground(image(), EXPRESSIONS[0]).tokens
    assert grid.stood_out == slow.outliers(grid.scores) < len(grid.kept) == 6
    assert "rounded up to one of 6, 15" in describe_tokens(open_bundle(copied.path).manifest)


def test_a_fixed_budget_says_nothing_of_what_stands_out(tiny_bundle):
    with GroundingSession.open(tiny_bundle, num_threads=1) as session:
        (grid,) = session.ground(image(), EXPRESSIONS[0]).tokens
    assert grid.stood_out is None


def test_engines_take_every_number_there_may_be(bundle):
    manifest = open_bundle(bundle).manifest
    limits = EngineLimits(max_prompt=40, max_new_tokens=8, max_batch=4, max_images=4)
    (profile,) = make_profiles(manifest, manifest.graph("token_pruner"), limits)
    taken = profile.values["num_kept_tokens"]
    assert (taken.min, taken.max) == ((1,), (15,))


def test_parity_holds_through_both_graphs(bundle, tiny_checkpoint, tiny_recipe):
    report = check_with_torch(
        bundle,
        tiny_recipe,
        Checkpoint.of(tiny_checkpoint),
        [Question(image=image(n), expression=EXPRESSIONS[n]) for n in range(3)],
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
            found = session.ground_batch(image(seed), EXPRESSIONS)
            wanted = reference.ground_batch(image(seed), EXPRESSIONS)
            assert [f.keep_indices for f in found] == [w.keep_indices for w in wanted]
            assert [f.token_ids for f in found] == [w.token_ids for w in wanted]
        pixels, texts = np.zeros((1, 3, 32, 32), np.float32), np.ones((1, 16), np.float32)
        feed = {"pixel_values": pixels, "text_embeds": texts}
        feed = session.backend.run("vision_encoder", feed) | {"num_kept_tokens": np.array([16])}
        with pytest.raises(UsageError, match=r"num_kept_tokens is beyond .*16.*1\.\.15"):
            session.backend.run("token_pruner", feed)
    assert device.memory == {}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda keep: keep[:, ::-1], "before"),
        (lambda keep: keep * 0, "0 more than once"),
        (lambda keep: keep + 16, "0..15"),
    ],
)
def test_a_graph_that_keeps_what_it_should_not_is_refused(tiny_bundle, wrong, says):
    with GroundingSession.open(tiny_bundle, num_threads=1) as session:
        session.backend = EditedBackend(session.backend, "keep_indices", wrong)
        with pytest.raises(BundleError, match="pruner spatial of this bundle does not") as caught:
            session.ground(image(), EXPRESSIONS[0])
    assert says in str(caught.value)
