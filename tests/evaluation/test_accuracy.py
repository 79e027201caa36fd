"""Accuracy rows: what is compared with what, and the collapse and recovery on the demo model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation import accuracy
from gap_export.evaluation.accuracy import evaluate_bundle, evaluate_model
from gap_export.manifest import EngineLimits, QuantizationSpec, SourceFile, SourcePart, SourceSpec
from gap_export.pipeline import ExportOptions, export_checkpoint, export_model
from tests.runtime.fake_tensorrt import copy_bundle, use_fakes, write_engines


@pytest.fixture
def known_graphs(exports, tiny_checkpoint, monkeypatch):
    """Evaluations take the tiny model's decoder and embeddings from other exports of this run."""
    cache = exports.graphs(str(tiny_checkpoint))
    monkeypatch.setattr(accuracy, "GraphCache", lambda: cache)
    monkeypatch.setattr(accuracy, "export_checkpoint", partial(export_checkpoint, cache=cache))


@pytest.mark.usefixtures("known_graphs")
def test_rows_are_unpruned_then_compact_and_gap_for_each_configuration(tiny_checkpoint, tmp_path):
    report = evaluate_model(
        ExportOptions(model=str(tiny_checkpoint), seed=4),
        pruners=["spatial", "random"],
        keep_ratios=[0.5, 0.3],
        num_samples=8,
        pictures=tmp_path / "drawn",
    )
    keys = [(row.pruner, row.keep_ratio, row.positions) for row in report.rows]
    assert keys == [
        ("none", 1.0, "none"),
        ("spatial", 0.5, "compact"),
        ("spatial", 0.5, "gap"),
        ("random", 0.5, "compact"),
        ("random", 0.5, "gap"),
        ("spatial", 0.3, "compact"),
        ("spatial", 0.3, "gap"),
        ("random", 0.3, "compact"),
        ("random", 0.3, "gap"),
    ]
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {"unpruned.png"} | {f"{p}-{k:g}-{mode}.png" for p, k, mode in keys[1:]}
    assert {(row.n, row.num_images, row.seed) for row in report.rows} == {(8, 2, 4)}
    assert all(0 <= row.ci95[0] <= row.acc_at_50 <= row.ci95[1] <= 1 for row in report.rows)


def test_fewer_samples_than_one_are_refused(tiny_checkpoint):
    with pytest.raises(UsageError, match="samples"):
        evaluate_model(ExportOptions(model=str(tiny_checkpoint)), num_samples=0)


def test_engines_of_a_bundle_are_measured_beside_onnx_runtime(
    tiny_bundle, tiny_whole_bundle, tmp_path, monkeypatch
):
    bundle = copy_bundle(tiny_bundle, tmp_path / "bundle")
    limits = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=4, max_images=1)
    write_engines(bundle, limits)
    device = use_fakes(monkeypatch)
    asked = {"baseline": tiny_whole_bundle, "num_samples": 4}
    given = evaluate_bundle(bundle.path, **asked, backend="tensorrt")
    assert "launch" not in device.calls and "synchronize" in device.calls
    assert given == evaluate_bundle(tiny_bundle, **asked)


def test_engines_that_cannot_run_are_refused_before_the_baseline_is_made(tiny_bundle, monkeypatch):
    def make(*args, **options):
        raise AssertionError("the baseline was made")

    monkeypatch.setattr(accuracy, "export_checkpoint", make)
    with pytest.raises(UsageError, match="holds no engines"):
        evaluate_bundle(tiny_bundle, num_samples=4, backend="tensorrt")


def test_a_pruned_baseline_is_refused(tiny_bundle):
    with pytest.raises(UsageError, match="baseline"):
        evaluate_bundle(tiny_bundle, baseline=tiny_bundle, num_samples=4)


def test_a_baseline_of_other_weights_is_refused(
    tiny_bundle, tiny_checkpoint, make_checkpoint, exports, tmp_path
):
    other = str(make_checkpoint(seed=1))
    options = ExportOptions(model=other, keep_ratio=1.0, out=tmp_path / "other")
    # Its weights differ, and no graph holds any.
    cache = exports.graphs(str(tiny_checkpoint))
    baseline = export_model(options, cache=cache).bundle
    with pytest.raises(UsageError, match=r"another model\.safetensors"):
        evaluate_bundle(tiny_bundle, baseline=baseline, num_samples=4)


def unpruned(manifest, **source):
    """The manifest's model at keep 1."""
    pruning = replace(manifest.pruning, keep_ratio=1.0)
    return replace(manifest, pruning=pruning, source=SourceSpec(**source))


def part(role, sha256):
    file = SourceFile(path="model.safetensors", size=1, sha256=sha256)
    return SourcePart(role=role, location="/nowhere", files=(file,))


def test_files_of_a_baseline_are_compared_within_their_part(sample_manifest):
    manifest = replace(
        sample_manifest, source=SourceSpec(parts=(part("main", "a"), part("base", "b")))
    )
    same = unpruned(manifest, parts=(part("base", "b"), part("main", "a"), part("tower", "c")))
    accuracy._check_baseline(manifest, same)
    other = unpruned(manifest, parts=(part("main", "a"), part("base", "a")))
    with pytest.raises(UsageError, match=r"another base/model\.safetensors"):
        accuracy._check_baseline(manifest, other)
    with pytest.raises(UsageError, match="no common weights"):
        accuracy._check_baseline(manifest, unpruned(manifest, parts=(part("tower", "a"),)))


def test_a_baseline_whose_weights_are_rounded_otherwise_is_refused(sample_manifest):
    manifest = replace(sample_manifest, source=SourceSpec(parts=(part("main", "a"),)))
    whole = unpruned(manifest, parts=(part("main", "a"),))
    accuracy._check_baseline(manifest, whole)
    spec = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
    graphs = tuple(replace(graph, quantization=spec) for graph in manifest.graphs)
    with pytest.raises(UsageError, match="another quantization"):
        accuracy._check_baseline(replace(manifest, graphs=graphs), whole)


def test_random_weights_are_compared_by_their_seed(sample_manifest):
    manifest = replace(sample_manifest, source=SourceSpec(parts=(), random_seed=3))
    accuracy._check_baseline(manifest, unpruned(manifest, parts=(), random_seed=3))
    for source in ({"parts": (), "random_seed": 4}, {"parts": (part("main", "a"),)}):
        with pytest.raises(UsageError, match="other random weights"):
            accuracy._check_baseline(manifest, unpruned(manifest, **source))


def test_the_baseline_of_a_bundle_is_made_in_its_dtype(tiny_bundle, monkeypatch):
    asked = []

    def refuse(recipe, checkpoint, options, *, progress):
        asked.append(options.dtype)
        raise UsageError("far enough")

    monkeypatch.setattr(accuracy, "export_checkpoint", refuse)
    with pytest.raises(UsageError, match="far enough"):
        evaluate_bundle(tiny_bundle, num_samples=4)
    assert asked == ["float32"]


@pytest.mark.usefixtures("known_graphs")
def test_a_checkpoint_folder_named_like_a_recipe_is_the_folder(
    tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch
):
    shutil.copytree(tiny_checkpoint, tmp_path / "refshapes-llava")
    monkeypatch.chdir(tmp_path)
    report = evaluate_bundle(
        tiny_bundle, checkpoint={"main": Path("refshapes-llava")}, num_samples=4
    )
    assert {row.model for row in report.rows} == {"tiny-llava"}


def test_a_slip_in_the_last_configuration_is_refused_before_anything_is_exported(
    tiny_checkpoint, monkeypatch
):
    monkeypatch.setattr(accuracy, "export_model", None)
    options = ExportOptions(model=str(tiny_checkpoint))
    with pytest.raises(UsageError, match="keep ratio"):
        evaluate_model(options, keep_ratios=[0.3, 1.5])
    with pytest.raises(UsageError, match="spatail"):
        evaluate_model(options, pruners=["cls", "spatail"])


@pytest.mark.usefixtures("known_graphs")
def test_score_order_needs_no_pruner_but_those_asked_for(tiny_checkpoint):
    options = ExportOptions(model=str(tiny_checkpoint), order="score")
    report = evaluate_model(options, pruners=["cls"], num_samples=4)
    assert [row.pruner for row in report.rows] == ["none", "cls", "cls"]


@pytest.mark.usefixtures("known_graphs")
def test_a_bundle_gives_the_same_rows_with_a_baseline_as_with_its_checkpoint(
    tiny_bundle, tiny_whole_bundle, tiny_checkpoint
):
    by_baseline = evaluate_bundle(tiny_bundle, baseline=tiny_whole_bundle, num_samples=4)
    by_checkpoint = evaluate_bundle(
        tiny_bundle, checkpoint={"main": tiny_checkpoint}, num_samples=4
    )
    assert by_baseline == by_checkpoint


@pytest.mark.parametrize("number", [100, pytest.param(300, marks=pytest.mark.full)])
def test_the_demo_model_collapses_without_gap_and_recovers_with_it(
    demo_bundle, demo_whole_bundle, number
):
    report = evaluate_bundle(demo_bundle, baseline=demo_whole_bundle, num_samples=number, seed=0)
    unpruned, compact, gap = report.rows
    assert unpruned.acc_at_50 >= 0.90
    assert compact.acc_at_50 <= 0.15 * unpruned.acc_at_50
    assert gap.acc_at_50 >= 0.80 * unpruned.acc_at_50
    assert report.worst_recovery() == gap.recovered == gap.acc_at_50 / unpruned.acc_at_50
