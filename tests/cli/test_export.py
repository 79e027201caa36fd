"""``gap-export export``."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gap_export import exporting
from gap_export.bundle import open_bundle
from gap_export.exporting import ExportOptions, ExportReport
from gap_export.spec.manifest import QuantizationSpec, TilesSpec
from gap_export.spec.requests import EnginesRequest, PruningRequest


def test_every_flag_reaches_the_export(run_cli, seen_options, tmp_path):
    flags = "--keep 0.5 --pruner cls --order score --positions compact --seed 7 --recipe demo "
    flags += "--extra-token weighted --extra-position centroid --budget adaptive "
    flags += "--pruner-text question "
    flags += "--checkpoint weights --checkpoint base=llm --dtype float16 --copy-weights"
    run_cli("export", "some/folder", *flags.split(), "--out", tmp_path, "--force")
    assert seen_options == [
        ExportOptions(
            model="some/folder",
            pruning=PruningRequest(
                keep_ratio=0.5,
                pruner="cls",
                order="score",
                extra_token="weighted",
                extra_position="centroid",
                budget="adaptive",
                pruner_text="question",
                positions="compact",
                seed=7,
            ),
            recipe="demo",
            checkpoint={"main": Path("weights"), "base": Path("llm")},
            dtype="float16",
            copy_weights=True,
            out=tmp_path,
            force=True,
        )
    ]


def test_flags_about_engines_reach_the_export(run_cli, seen_options):
    flags = "--trt rtx:sm89 --trt orin --lowering portable --max-prompt 200 --max-new-tokens 20"
    run_cli("demo", *flags.split(), "--batch", "4")
    run_cli("demo", "--trt", "--keep", "0.3")
    run_cli("demo", "--trt")
    assert seen_options == [
        ExportOptions(
            model="demo",
            engines=EnginesRequest(
                targets=("rtx:sm89", "orin"),
                lowering="portable",
                max_prompt=200,
                max_new_tokens=20,
                max_batch=4,
            ),
        ),
        ExportOptions(
            model="demo",
            pruning=PruningRequest(keep_ratio=0.3),
            engines=EnginesRequest(targets=("auto",)),
        ),
        ExportOptions(model="demo", engines=EnginesRequest(targets=("auto",))),
    ]


def test_int4_is_a_matter_of_weights_and_leaves_the_graphs_their_dtype(run_cli, seen_options):
    run_cli("demo", "--dtype", "int4")
    run_cli("demo", "--dtype", "int4", "--block-size", "64", "--quantize-lm-head")
    plain = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
    assert [(options.dtype, options.quantization) for options in seen_options] == [
        (None, plain),
        (None, replace(plain, block_size=64, lm_head=True)),
    ]
    run_cli("demo", "--dtype", "int4", "--quantizer", "awq")
    assert seen_options[-1].quantization == replace(plain, method="awq")
    assert seen_options[-1].calibration


def test_random_weights_are_asked_for_by_their_flag(run_cli, seen_options):
    run_cli("llava", "--random-weights", "--seed", "3")
    assert seen_options == [
        ExportOptions(model="llava", pruning=PruningRequest(seed=3), random_weights=True)
    ]


def test_weights_that_are_not_here_exit_2_with_the_way_to_get_them(run_cli, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere/hub")
    outcome = run_cli("llava", "--keep", "0.3")
    assert (outcome.code, outcome.out) == (2, "")
    for words in (
        "weights of llava-1.5-7b are not on this machine: main",
        "llava-hf/llava-1.5-7b-hf or",
        "in /nowhere/hub",
        "hf download llava-hf/llava-1.5-7b-hf",
        "--checkpoint main=PATH",
    ):
        assert words in outcome.err


def test_a_bundle_is_replaced_by_force_alone(run_cli, tiny_bundle, tiny_checkpoint, tmp_path):
    out = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    outcome = run_cli(tiny_checkpoint, "--keep", "0.25", "--out", out)
    assert (outcome.code, outcome.out) == (2, "")
    assert "--force" in outcome.err
    assert open_bundle(out).manifest.pruning.num_kept_tokens == 5

    outcome = run_cli(tiny_checkpoint, "--keep", "0.25", "--out", out, "--force")
    assert (outcome.code, outcome.out) == (0, f"{out}\n")
    assert "4 of 16 visual tokens (spatial, gap positions), 4 graphs" in outcome.err
    assert open_bundle(out, verify="full").manifest.pruning.num_kept_tokens == 4


def test_json_says_where_the_bundle_is_and_quiet_says_nothing_else(
    run_cli, monkeypatch, tiny_bundle
):
    manifest = open_bundle(tiny_bundle).manifest
    report = ExportReport(bundle=tiny_bundle, manifest=manifest, seconds={"trace": 1.5})
    monkeypatch.setattr(exporting, "export_model", lambda options, *, progress, warn: report)
    outcome = run_cli("demo", "--json", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.plain["bundle"] == str(tiny_bundle)
    assert (outcome.plain["num_kept_tokens"], outcome.plain["num_visual_tokens"]) == (5, 16)


@pytest.fixture
def reported(monkeypatch, tiny_bundle):
    """Makes the next export report a manifest of the caller's making."""

    def report(**changes):
        manifest = replace(open_bundle(tiny_bundle).manifest, **changes)
        made = ExportReport(bundle=tiny_bundle, manifest=manifest, seconds={"trace": 1.5})
        monkeypatch.setattr(exporting, "export_model", lambda options, *, progress, warn: made)
        return manifest

    return report


def test_tokens_of_tiles_are_accounted_for_by_tile(run_cli, reported, sample_manifest):
    reported(
        image=replace(
            sample_manifest.image,
            preparation="anyres",
            tiles=TilesSpec(resolutions=((32, 64), (64, 64))),
        )
    )
    err = run_cli("demo").err
    assert "5 of 16 visual tokens of each tile (up to 5 tiles: at most 25 of 80, " in err
    assert "and a newline after each row)" in err


def test_what_is_shared_with_the_checkpoint_is_said(run_cli, reported):
    manifest = reported()
    assert "linked" not in run_cli("demo").err
    linked = [replace(manifest.files[0], held="linked", size=13_500_000_000)]
    reported(files=(*linked, *manifest.files[1:]))
    assert "13.5 GB linked to the checkpoint" in run_cli("demo").err


def test_random_weights_are_warned_of(run_cli, reported):
    reported()
    assert "warning: the weights are random" in run_cli("demo", "--random-weights").err
    assert "random" not in run_cli("demo").err


def test_a_folder_that_is_no_bundle_survives_force(run_cli, tiny_checkpoint, tmp_path):
    treasure = tmp_path / "photos" / "only-copy.jpg"
    treasure.parent.mkdir()
    treasure.write_bytes(b"1")
    outcome = run_cli(tiny_checkpoint, "--out", treasure.parent, "--force")
    assert outcome.code == 2
    assert "photos" in outcome.err
    assert [p.name for p in tmp_path.rglob("*")] == ["photos", "only-copy.jpg"]


def test_int4_for_a_cpu_has_float32_graphs_and_the_activations_asked_for(run_cli, seen_options):
    run_cli("demo", "--dtype", "int4", "--for", "cpu")
    run_cli("demo", "--dtype", "int4", "--activations", "float")
    run_cli("demo", "--for", "cpu")
    seen = [(options.dtype, options.activations) for options in seen_options]
    assert seen == [("float32", "int8"), (None, "float"), ("float32", "float")]


def test_an_export_says_that_float16_graphs_are_slow_on_a_cpu(tiny_checkpoint, tmp_path):
    said: list[str] = []
    options = ExportOptions(model=str(tiny_checkpoint), dtype="float16", out=tmp_path / "half")
    exporting.export_model(options, warn=said.append)
    assert [text for text in said if "--for cpu" in text]
    said.clear()
    exporting.export_model(replace(options, dtype="float32", force=True), warn=said.append)
    assert not [text for text in said if "--for cpu" in text]
