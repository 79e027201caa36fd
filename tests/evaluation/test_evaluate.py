"""Evaluations: what is compared with what, and the collapse and recovery on the demo model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from PIL import Image

from gap_export.errors import ImageError, OutputError, UsageError
from gap_export.evaluation import evaluate, job, kept_baselines
from gap_export.evaluation.evaluate import Asking, evaluate_bundle, evaluate_model
from gap_export.exporting import ExportOptions, export_model, resolve_options
from gap_export.report import EVALUATION_SCHEMA
from gap_export.spec.manifest import EngineLimits, SourceSpec
from gap_export.spec.requests import PruningRequest
from tests.runtime.backends.fake_tensorrt import copy_bundle, use_fakes, write_engines


@pytest.fixture
def known_bundles(exports, monkeypatch):
    """Evaluations take bundles of the tiny model from other tests of this run."""

    def bundle_of(options, **_):
        plain, asked = vars(PruningRequest()), vars(options.pruning)
        changed = {name: value for name, value in asked.items() if value != plain[name]}
        if options.pruning.keep_ratio == 1.0:
            changed = {"keep_ratio": 1.0}
        return SimpleNamespace(bundle=exports.bundle(model=options.model, **changed))

    export = evaluate.export_checkpoint

    def checkpoint_of(recipe, checkpoint, options, **how):
        if Path(options.model).is_dir():
            return bundle_of(options)
        return export(recipe, checkpoint, options, **how)

    monkeypatch.setattr(evaluate, "export_model", bundle_of)
    monkeypatch.setattr(evaluate, "export_checkpoint", checkpoint_of)


@pytest.fixture
def per_split(tmp_path):
    """A data set of three images, one of which is missing, and of an empty box."""
    root = tmp_path / "data"
    root.mkdir()
    rows = []
    for number in range(3):
        name = f"COCO_train2014_{number:012}"
        if number != 2:
            Image.new("RGB", (64, 48), (40 * number, 90, 90)).save(root / f"{name}.jpg")
        rows += [
            {"img_id": f"{name}_{n}", "sents": text, "bbox": box, "height": 48, "width": 64}
            for n, (text, box) in enumerate(
                [("the red circle", [4, 4, 20, 20]), ("the star", [30, 8, 0 if number else 9, 9])]
            )
        ]
    (root / "refcoco_val.json").write_text(json.dumps(rows))
    return root


def without_times(report):
    """What does not depend on how long it took and what ran it."""
    rows = [replace(row, latency_ms={}, backend="") for row in report.rows]
    return replace(report, rows=tuple(rows), backend="")


@pytest.mark.usefixtures("known_bundles")
def test_rows_are_unpruned_then_compact_and_gap_for_each_configuration(tiny_checkpoint, tmp_path):
    report = evaluate_model(
        ExportOptions(model=str(tiny_checkpoint)),
        prunings=PruningRequest().variants(["spatial", "text", "spatial"], [0.3]),
        num_samples=8,
        asking=Asking(pictures=tmp_path / "drawn", misaligned=("shifted", "permuted")),
    )
    keys = [(row.pruner, row.keep_ratio, row.positions) for row in report.rows]
    assert keys == [
        ("none", 1.0, "none"),
        ("none", 1.0, "shifted"),
        ("none", 1.0, "permuted"),
        ("spatial", 0.3, "compact"),
        ("spatial", 0.3, "gap"),
        ("text", 0.3, "compact"),
        ("text", 0.3, "gap"),
    ]
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {"unpruned.png", "shifted.png", "permuted.png"} | {
        f"{p}-keep-{k:g}-{mode}.png" for p, k, mode in keys[3:]
    }
    assert {(row.n, row.num_images, row.seed) for row in report.rows} == {(8, 2, 0)}
    assert all(0 <= row.ci95[0] <= row.acc_at_50 <= row.ci95[1] <= 1 for row in report.rows)
    assert [(pair.first, pair.second) for pair in report.comparisons[:4]] == [
        ("unpruned", "shifted"),
        ("unpruned", "permuted"),
        ("spatial keep 0.3 gap", "spatial keep 0.3 compact"),
        ("unpruned", "spatial keep 0.3 gap"),
    ]
    assert len(report.comparisons) == 6
    assert report.misalignments.keys() == {"shifted", "permuted"}
    assert "2 higher" in report.misalignments["shifted"]


def test_a_model_that_never_emits_a_box_has_an_accuracy_of_0(tiny_bundle, tiny_whole_bundle):
    report = evaluate_bundle(tiny_bundle, baseline=tiny_whole_bundle, num_samples=5)
    for row in report.rows:
        assert (row.n, row.acc_at_50, row.mean_iou, row.parse_failures) == (5, 0, 0, 5)
        assert (row.num_unusable, row.recovered, set(row.curve.values())) == (0, None, {0.0})
    assert report.worst_recovery() is None
    assert all((pair.neither, pair.mcnemar_p) == (5, 1.0) for pair in report.comparisons)
    plain = json.loads(json.dumps(report.to_plain(), allow_nan=False))
    jsonschema.validate(plain, json.loads(EVALUATION_SCHEMA.read_text()))
    assert {item["kind"] for item in plain["gallery"]} == {"worst"}
    assert "image" not in plain["gallery"][0]


def test_a_report_says_what_was_asked_and_how(tiny_bundle, tiny_whole_bundle):
    prompt = "<image> USER: {expression} ASSISTANT:"
    report = evaluate_bundle(
        tiny_bundle,
        baseline=tiny_whole_bundle,
        num_samples=4,
        seed=2,
        asking=Asking(data="refshapes:train", protocol="lmms", prompt=prompt),
    )
    assert (report.model, report.family) == ("tiny-llava", "llava")
    assert (report.protocol, report.prompt, report.seed) == ("lmms", prompt, 2)
    assert (report.data.splits, report.data.num_expressions) == (("train",), 4)
    assert {row.protocol for row in report.rows} == {"lmms"}
    assert all(row.backend.startswith("ONNX Runtime ") for row in report.rows)
    assert report.rows[0].by_split.keys() == {"train"}
    assert report.rows[0].latency_ms.keys() >= {"vision_encoder", "prefill", "decode", "total"}


def test_expressions_without_their_image_count_as_wrong_and_bad_annotations_do_not(
    tiny_bundle, tiny_whole_bundle, per_split
):
    report = evaluate_bundle(
        tiny_bundle, baseline=tiny_whole_bundle, asking=Asking(data=str(per_split))
    )
    data = report.data
    assert (data.num_expressions, data.num_images, data.num_excluded) == (6, 2, 2)
    reasons = sorted(one.reason for one in data.unusable)
    assert reasons == ["empty box", "empty box", "missing picture"]
    for row in report.rows:
        assert (row.n, row.num_images, row.num_unusable) == (4, 3, 1)
        assert row.acc_at_50_usable is not None
        assert row.by_split["val"].n == 4
    assert all(pair.n == 4 for pair in report.comparisons)


def test_answers_that_are_kept_are_not_asked_again(
    tiny_bundle, tiny_whole_bundle, tmp_path, monkeypatch
):
    asked = {"baseline": tiny_whole_bundle, "num_samples": 4}
    asking = Asking(records=tmp_path / "records")
    first = evaluate_bundle(tiny_bundle, **asked, asking=asking)
    names = {path.name for path in asking.records.iterdir()}
    assert names == {
        "unpruned.jsonl",
        "spatial-keep-0.3-compact.jsonl",
        "spatial-keep-0.3-gap.jsonl",
    }

    def refuse(runner, shard):
        raise AssertionError("asked again")

    monkeypatch.setattr(job.Runner, "answer", refuse)
    assert evaluate_bundle(tiny_bundle, **asked, asking=asking) == first
    with pytest.raises(OutputError, match="another evaluation"):
        evaluate_bundle(tiny_bundle, **{**asked, "num_samples": 3}, asking=asking)


@pytest.mark.parametrize(
    ("num_samples", "asking", "message"),
    [
        (-1, Asking(), "too few samples"),
        (0, Asking(), "has no end"),
        (4, Asking(data="refshapes:val"), "no such split"),
        (4, Asking(data="/nowhere/at/all"), "no such data set"),
        (4, Asking(protocol="coco"), "no such protocol"),
        (4, Asking(prompt="what?"), "prompt cannot be used"),
        (4, Asking(workers="none"), "no such workers"),
        (4, Asking(misaligned=("sideways",)), "no such misalignment"),
        (4, Asking(records=Path("/dev/null/records")), "records cannot be made"),
        (4, Asking(pictures=Path("/dev/null/images")), "drawings cannot be made"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_exported(
    tiny_checkpoint, monkeypatch, num_samples, asking, message
):
    monkeypatch.setattr(evaluate, "export_model", None)
    options = ExportOptions(model=str(tiny_checkpoint))
    with pytest.raises(UsageError, match=message):
        evaluate_model(options, num_samples=num_samples, asking=asking)


def test_500_samples_of_refshapes_and_all_of_other_data_are_the_default(
    tiny_checkpoint, per_split, monkeypatch
):
    asked = []

    def refuse(spec, *, samples, seed, absent):
        assert absent == 0
        asked.append((spec, samples, seed))
        raise ImageError("far enough")

    monkeypatch.setattr(job, "open_dataset", refuse)
    options = ExportOptions(model=str(tiny_checkpoint), pruning=PruningRequest(seed=3))
    for data in ("refshapes", "refshapes:train", str(per_split)):
        for number in (None, 7, 0):
            with pytest.raises(ImageError):
                evaluate_model(options, num_samples=number, asking=Asking(data=data))
    assert [samples for _, samples, _ in asked] == [500, 7, None, 500, 7, None, None, 7, None]
    assert {seed for *_, seed in asked} == {3}


def test_engines_of_a_bundle_are_measured_beside_onnx_runtime(
    tiny_bundle, tiny_whole_bundle, tmp_path, monkeypatch
):
    bundle = copy_bundle(tiny_bundle, tmp_path / "bundle")
    # Fewer at a time than there are expressions about an image.
    limits = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=3, max_images=1)
    write_engines(bundle, limits)
    device = use_fakes(monkeypatch)
    asked = {"baseline": tiny_whole_bundle, "num_samples": 4}
    given = evaluate_bundle(bundle.path, **asked, backend="tensorrt")
    assert "launch" not in device.calls and "synchronize" in device.calls
    assert given.backend == "tensorrt"
    assert [row.backend.split()[0] for row in given.rows] == ["ONNX", "TensorRT", "TensorRT"]
    assert [row.mean_batch_size for row in given.rows] == [4, 2, 2]
    plain = evaluate_bundle(tiny_bundle, **asked)
    rows = [replace(row, mean_batch_size=4) for row in without_times(given).rows]
    assert rows == list(without_times(plain).rows)


def test_engines_that_cannot_run_are_refused_before_the_baseline_is_made(tiny_bundle, monkeypatch):
    def make(*args, **options):
        raise AssertionError("the baseline was made")

    monkeypatch.setattr(evaluate, "export_checkpoint", make)
    with pytest.raises(UsageError, match="holds no engines"):
        evaluate_bundle(tiny_bundle, num_samples=4, backend="tensorrt")


def test_a_pruned_baseline_is_refused(tiny_bundle):
    with pytest.raises(UsageError, match="baseline"):
        evaluate_bundle(tiny_bundle, baseline=tiny_bundle, num_samples=4)


def test_a_baseline_of_other_weights_is_refused(tiny_bundle, make_checkpoint, tmp_path):
    other = str(make_checkpoint(seed=1))
    options = ExportOptions(
        model=other, pruning=PruningRequest(keep_ratio=1.0), out=tmp_path / "other"
    )
    baseline = export_model(options).bundle
    with pytest.raises(UsageError, match=r"another model\.safetensors"):
        evaluate_bundle(tiny_bundle, baseline=baseline, num_samples=4)


def test_the_baseline_of_a_bundle_is_made_in_its_dtype(tiny_bundle, monkeypatch):
    asked = []

    def refuse(recipe, checkpoint, options, **_):
        asked.append(options.dtype)
        raise UsageError("far enough")

    monkeypatch.setattr(evaluate, "export_checkpoint", refuse)
    with pytest.raises(UsageError, match="far enough"):
        evaluate_bundle(tiny_bundle, num_samples=4)
    assert asked == ["float32"]


@pytest.mark.usefixtures("known_bundles")
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
    monkeypatch.setattr(evaluate, "export_model", None)
    options = ExportOptions(model=str(tiny_checkpoint))
    with pytest.raises(UsageError, match="keep ratio"):
        evaluate_model(options, prunings=PruningRequest().variants((), [0.3, 1.5]))
    with pytest.raises(UsageError, match="spatail"):
        evaluate_model(options, prunings=PruningRequest().variants(["cls", "spatail"]))


@pytest.fixture
def exported(tiny_recipe, monkeypatch):
    """How each export of an evaluation would prune; nothing is exported or asked."""
    prunings = []

    def note(options, **_):
        prunings.append(resolve_options(tiny_recipe, options))
        return SimpleNamespace(bundle=Path())

    manifest = SimpleNamespace(source=SourceSpec(parts=()))
    monkeypatch.setattr(evaluate, "open_bundle", lambda _: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(evaluate, "export_model", note)
    monkeypatch.setattr(
        evaluate, "export_checkpoint", lambda recipe, checkpoint, options, **_: note(options)
    )
    monkeypatch.setattr(job.Job, "measure", lambda *_, **__: None)
    # What was not exported cannot be kept, and would be made again.
    monkeypatch.setattr(kept_baselines, "cache_folder", lambda: None)
    return prunings


@pytest.mark.parametrize(
    ("keep_ratios", "budgets"),
    [
        ((), [("adaptive", 1.0), ("fixed", 0.3), ("fixed", 1.0)]),
        ((0.5, 0.3), [*[("fixed", 0.5)] * 2, *[("fixed", 0.3)] * 2, ("fixed", 1.0)]),
    ],
)
def test_without_a_share_a_pruner_leaves_the_number_to_the_image_as_in_export(
    tiny_checkpoint, exported, keep_ratios, budgets
):
    options = ExportOptions(model=str(tiny_checkpoint))
    prunings = PruningRequest().variants(["trim", "spatial"], keep_ratios)
    evaluate_model(options, prunings=prunings, num_samples=1)
    assert [(one.budget, one.keep_ratio) for one in exported] == budgets


def test_the_unpruned_model_is_in_raster_order_whatever_that_of_the_pruned_ones(
    tiny_checkpoint, exported
):
    pruning = PruningRequest(order="score", pruner="cls")
    evaluate_model(ExportOptions(model=str(tiny_checkpoint), pruning=pruning), num_samples=1)
    assert [(one.keep_ratio, one.order) for one in exported] == [(0.3, "score"), (1.0, "raster")]


@pytest.mark.usefixtures("known_bundles")
def test_a_bundle_gives_the_same_rows_with_a_baseline_as_with_its_checkpoint(
    tiny_bundle, tiny_whole_bundle, tiny_checkpoint
):
    by_baseline = evaluate_bundle(tiny_bundle, baseline=tiny_whole_bundle, num_samples=4)
    by_checkpoint = evaluate_bundle(
        tiny_bundle, checkpoint={"main": tiny_checkpoint}, num_samples=4
    )
    assert without_times(by_baseline) == without_times(by_checkpoint)


@pytest.mark.parametrize("number", [60, pytest.param(300, marks=pytest.mark.full)])
def test_the_demo_model_collapses_without_gap_and_recovers_with_it(
    demo_bundle, demo_whole_bundle, number
):
    report = evaluate_bundle(demo_bundle, baseline=demo_whole_bundle, num_samples=number, seed=0)
    unpruned, compact, gap = report.rows
    assert unpruned.acc_at_50 >= 0.90
    assert compact.acc_at_50 <= 0.15 * unpruned.acc_at_50
    assert gap.acc_at_50 >= 0.80 * unpruned.acc_at_50
    assert compact.ci95[1] < gap.ci95[0]
    assert report.worst_recovery() == gap.recovered == gap.acc_at_50 / unpruned.acc_at_50
    assert report.comparisons[0].mcnemar_p < 1e-6
    assert [item.kind for item in report.gallery].count("flipped by GAP") == 8


@pytest.mark.full
def test_each_misalignment_alone_hurts_the_demo_model(demo_bundle, demo_whole_bundle):
    report = evaluate_bundle(
        demo_bundle,
        baseline=demo_whole_bundle,
        num_samples=200,
        asking=Asking(misaligned=("permuted", "shifted")),
    )
    unpruned, permuted, shifted, *_ = report.rows
    assert {row.mean_visual_tokens for row in (unpruned, permuted, shifted)} == {144}
    assert permuted.acc_at_50 <= 0.25 * unpruned.acc_at_50
    assert shifted.acc_at_50 <= 0.25 * unpruned.acc_at_50
