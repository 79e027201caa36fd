"""``gap-export export``."""

from __future__ import annotations

import shutil

import pytest

from gap_export import pipeline
from gap_export.bundle import open_bundle
from gap_export.pipeline import ExportOptions, ExportReport


def test_every_flag_reaches_the_export(run_cli, seen_options, tmp_path):
    flags = "--keep 0.5 --pruner cls --order score --positions compact --seed 7 --recipe demo"
    run_cli("export", "some/folder", *flags.split(), "--out", tmp_path, "--force")
    assert seen_options == [
        ExportOptions(
            model="some/folder",
            keep_ratio=0.5,
            pruner="cls",
            order="score",
            positions="compact",
            seed=7,
            recipe="demo",
            out=tmp_path,
            force=True,
        )
    ]


def test_a_bundle_is_replaced_by_force_alone(run_cli, tiny_bundle, tiny_checkpoint, tmp_path):
    out = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    outcome = run_cli(tiny_checkpoint, "--keep", "0.25", "--out", out)
    assert (outcome.code, outcome.out) == (2, "")
    assert "--force" in outcome.err
    assert open_bundle(out).manifest.pruning.num_kept_tokens == 5

    outcome = run_cli(tiny_checkpoint, "--keep", "0.25", "--out", out, "--force")
    assert (outcome.code, outcome.out) == (0, f"{out}\n")
    assert "4 of 16 visual tokens (spatial, gap positions), 3 graphs" in outcome.err
    assert open_bundle(out, verify="full").manifest.pruning.num_kept_tokens == 4


def test_json_says_where_the_bundle_is_and_quiet_says_nothing_else(
    run_cli, monkeypatch, tiny_bundle
):
    manifest = open_bundle(tiny_bundle).manifest
    report = ExportReport(bundle=tiny_bundle, manifest=manifest, seconds={"trace": 1.5})
    monkeypatch.setattr(pipeline, "export_model", lambda options, *, progress: report)
    outcome = run_cli("demo", "--json", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.plain["bundle"] == str(tiny_bundle)
    assert (outcome.plain["num_kept_tokens"], outcome.plain["num_visual_tokens"]) == (5, 16)


@pytest.mark.parametrize("keep", ["0", "-0.1", "1.01", "nan", "inf"])
def test_keep_out_of_range_exits_2_and_leaves_nothing(run_cli, tiny_checkpoint, tmp_path, keep):
    outcome = run_cli(tiny_checkpoint, f"--keep={keep}", "--out", tmp_path / "bundle")
    assert outcome.code == 2
    assert "0 < keep <= 1" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_survives_force(run_cli, tiny_checkpoint, tmp_path):
    treasure = tmp_path / "photos" / "only-copy.jpg"
    treasure.parent.mkdir()
    treasure.write_bytes(b"1")
    outcome = run_cli(tiny_checkpoint, "--out", treasure.parent, "--force")
    assert outcome.code == 2
    assert "photos" in outcome.err
    assert [p.name for p in tmp_path.rglob("*")] == ["photos", "only-copy.jpg"]
