"""A run on the demo bundles, in processes of their own; no speed is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

import gap_export
from gap_export.benchmark.contenders import contenders_of
from gap_export.benchmark.measure import in_turn, measure
from gap_export.benchmark.process import WorkerProcess
from gap_export.benchmark.questions import plan_rounds
from gap_export.benchmark.summary import BenchSettings
from gap_export.errors import GapExportError, UsageError


@pytest.fixture(scope="module")
def report(demo_bundle, demo_whole_bundle):
    return gap_export.bench(
        demo_bundle,
        unpruned=demo_whole_bundle,
        rounds=2,
        expressions_per_image=2,
        answer_tokens=3,
        fail_under={"speedup": 1e9, "text_encoder": 1.0},
        num_threads=1,
    )


def test_every_stage_of_every_bundle_is_measured(report):
    whole, pruned = report.rows
    for row in report.rows:
        stages = {"preprocess", "vision_encoder", "embed_tokens", "prefill", "decode", "total"}
        assert stages | {"decode_token", "cpu", "all_expressions", "next_question"} <= set(
            row.stages
        )
        assert row.stages["total"].n == 2
        assert row.answer_tokens == 3
        assert 0 < row.memory.own <= row.memory.steady <= row.memory.peak
        assert min(*row.open_ms, row.first_call_ms, row.gemm_share, row.bandwidth_share) > 0
    # 144 visual tokens, of which 43 are kept.
    assert whole.prompt_tokens - pruned.prompt_tokens == 101
    assert (whole.ideal, whole.speedup) == (None, {})
    assert pruned.ideal == pytest.approx(whole.prompt_tokens / pruned.prompt_tokens)
    assert pruned.speedup["total"].median > 0


def test_a_bar_that_is_not_reached_is_said(report):
    slow, not_run = report.failures
    assert "speedup" in slow and "must be 1e+09" in slow
    # No pruner that reads the text: a bar on it must not pass for want of a figure.
    assert not_run.endswith("text_encoder was not measured, must be 1")


def test_the_report_is_json(report):
    plain = json.loads(json.dumps(report.to_plain(), allow_nan=False))
    assert (plain["schema"], len(plain["rows"])) == ("gap-export-bench", 2)


def test_a_worker_tells_what_is_wrong_as_the_error_it_is(tmp_path):
    with WorkerProcess() as worker:
        arguments = {"bundle": str(tmp_path), "arguments": {}, "answer_tokens": None}
        with pytest.raises(gap_export.BundleError):
            worker.do("open", **arguments)
        assert worker.do("memory")["peak"] > 0, "it goes on"


def test_a_worker_that_ends_is_an_error_with_its_last_words():
    words = r"ended: exit code 1: KeyError: 'nonsense'"
    with WorkerProcess() as worker, pytest.raises(GapExportError, match=words):
        worker.do("nonsense")


def test_each_is_first_in_its_turn():
    orders = [in_turn(["a", "b", "c"], number) for number in range(6)]
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    # Each follows each.
    assert len({pair for order in orders for pair in pairwise(order)}) == 6


def test_bars_need_something_to_compare_with(demo_bundle):
    with pytest.raises(UsageError, match="beside each an unpruned one of the same dtype"):
        gap_export.bench(demo_bundle, fail_under={"speedup": 2.0})
    with pytest.raises(UsageError, match="no such choice: speed"):
        gap_export.bench(demo_bundle, fail_under={"speed": 2.0})
    for bar in (float("nan"), 0.0):
        with pytest.raises(UsageError, match="no such speed-up"):
            gap_export.bench(demo_bundle, fail_under={"speedup": bar})


def test_a_bar_is_on_every_pruned_bundle(demo_whole_bundle, demo_bundle):
    pruned, whole = contenders_of([demo_bundle, demo_whole_bundle], ["ort"])
    half = replace(pruned.manifest, dtype="float16")
    other = replace(pruned, name="half", bundle=replace(pruned.bundle, manifest=half))
    settings = BenchSettings(bars={"speedup": 2.0})
    with pytest.raises(UsageError, match="float16"):
        measure([pruned, other, whole], [], settings)


def test_an_unpruned_bundle_drops_nothing(demo_bundle, demo_whole_bundle):
    with pytest.raises(UsageError, match="drops tokens itself"):
        gap_export.bench(demo_whole_bundle, unpruned=demo_bundle)


def test_rounds_take_the_users_images_and_expressions_in_turn(tmp_path):
    images = [tmp_path / name for name in ("a.png", "b.png")]
    for image in images:
        image.touch()
    rounds = plan_rounds(num_rounds=3, num_expressions=3, images=images, expressions=["one", "two"])
    assert [one.load() for one in rounds] == [
        (image, ["one", "two", "one"]) for image in (images[0], images[1], images[0])
    ]
    with pytest.raises(UsageError, match="no such image"):
        plan_rounds(num_rounds=1, num_expressions=1, images=[tmp_path / "c.png"])
    with pytest.raises(UsageError, match="nothing to measure"):
        plan_rounds(num_rounds=0, num_expressions=1)


def test_warm_up_shows_other_images():
    (measured,) = plan_rounds(num_rounds=1, num_expressions=20)
    image, texts = measured.load()
    warm, _ = type(measured)(number=-1, image=None, expressions=(), num_expressions=1).load()
    assert len(texts) == 20
    assert (image != warm).any()
