"""``gap-export eval``, on measured rows that are made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from gap_export.evaluation import accuracy
from gap_export.evaluation.accuracy import AccuracyRow, EvaluationReport
from gap_export.pipeline import ExportOptions


def row(pruner, positions, value, recovered):
    return AccuracyRow(
        model="refshapes-llava",
        pruner=pruner,
        keep_ratio=1.0 if pruner == "none" else 0.3,
        positions=positions,
        seed=0,
        n=500,
        num_images=125,
        acc_at_50=value,
        ci95=(value - 0.02, value + 0.02),
        mean_iou=0.5,
        recovered=recovered,
        mean_visual_tokens=144.0 if pruner == "none" else 43.0,
    )


REPORT = EvaluationReport(
    rows=(
        row("none", "none", 0.96, None),
        row("spatial", "compact", 0.04, 0.04),
        row("spatial", "gap", 0.912, 0.95),
        row("cls", "compact", 0.04, 0.04),
        row("cls", "gap", 0.768, 0.8),
    )
)


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the evaluations asked for."""
    seen = []

    def record(target, **arguments):
        del arguments["progress"]
        seen.append((target, arguments))
        return REPORT

    monkeypatch.setattr(accuracy, "evaluate_model", record)
    monkeypatch.setattr(accuracy, "evaluate_bundle", record)
    return seen


@pytest.fixture
def bundle(tmp_path):
    """Looks like a bundle from outside."""
    (tmp_path / "gap.json").write_text("{}")
    return tmp_path


def test_every_flag_of_a_model_reaches_the_evaluation(run_cli, calls):
    flags = "--pruner cls,spatial --pruner cls --keep 0.3 --keep 0.5 --order score --seed 3 "
    flags += "--extra-token mean --extra-position centroid --budget fixed "
    flags += "--checkpoint weights --checkpoint base=llm --dtype float16 --recipe llava"
    flags += " --pictures drawn"
    run_cli("eval", "demo", *flags.split(), "--samples", "20", "--data", "refshapes")
    options = ExportOptions(
        model="demo",
        recipe="llava",
        checkpoint={"main": Path("weights"), "base": Path("llm")},
        dtype="float16",
        order="score",
        extra_token="mean",
        extra_position="centroid",
        budget="fixed",
        seed=3,
    )
    arguments = {
        "pruners": ["cls", "spatial"],
        "keep_ratios": [0.3, 0.5],
        "num_samples": 20,
        "pictures": Path("drawn"),
    }
    assert calls == [(options, arguments)]


def test_every_flag_of_a_bundle_reaches_the_evaluation(run_cli, calls, bundle, tmp_path):
    flags = "--baseline whole --checkpoint weights --samples 20 --backend trt --engines rtx-sm89"
    run_cli("eval", bundle, *flags.split())
    arguments = {
        "baseline": Path("whole"),
        "checkpoint": {"main": Path("weights")},
        "seed": 0,
        "num_samples": 20,
        "pictures": None,
        "backend": "tensorrt",
        "engines": "rtx-sm89",
    }
    assert calls == [(bundle, arguments)]


@pytest.mark.parametrize(
    "flag", [["--keep", "0.3"], ["--pruner", "cls"], ["--order", "raster"], ["--budget", "fixed"]]
)
def test_flags_of_a_model_are_refused_for_a_bundle(run_cli, calls, bundle, flag):
    outcome = run_cli("eval", bundle, *flag)
    assert (outcome.code, calls) == (2, [])
    assert outcome.err == f"error: {flag[0]} cannot be used here: a bundle is pruned already\n"


@pytest.mark.parametrize("flag", [["--recipe", "llava"], ["--dtype", "float16"]])
def test_what_a_bundle_says_itself_is_refused_for_it(run_cli, calls, bundle, flag):
    outcome = run_cli("eval", bundle, *flag)
    assert (outcome.code, calls) == (2, [])
    assert f"{flag[0]} cannot be used here" in outcome.err


@pytest.mark.parametrize(
    "flag", [["--baseline", "whole"], ["--backend", "trt"], ["--engines", "rtx-sm89"]]
)
def test_flags_of_a_bundle_are_refused_for_a_model(run_cli, calls, flag):
    outcome = run_cli("eval", "demo", *flag)
    assert (outcome.code, calls) == (2, [])
    assert f"{flag[0]} cannot be used here" in outcome.err


def test_the_table_prints_percent_and_json_shares(run_cli, calls):
    lines = run_cli("eval", "demo").out.splitlines()
    assert "500 expressions, 125 pictures" in lines[0]
    assert lines[4].split() == ["none", "1", "144", "none", "96.0", "94.0-98.0", "-", "50.0"]
    assert lines[6].split() == ["spatial", "0.3", "43", "gap", "91.2", "89.2-93.2", "95.0", "50.0"]

    plain = run_cli("eval", "demo", "--json").plain
    assert list(plain) == ["rows"]
    wanted = {"model", "pruner", "keep_ratio", "positions", "seed", "n", "acc_at_50", "ci95"}
    assert wanted <= set(plain["rows"][0])
    assert plain["rows"][2]["acc_at_50"] == 0.912
    assert [r["positions"] for r in plain["rows"]] == ["none", "compact", "gap", "compact", "gap"]


def test_a_bar_that_is_met_exits_0_and_one_that_is_not_exits_3(run_cli, calls):
    assert run_cli("eval", "demo", "--min-recovered", "0.8").code == 0
    outcome = run_cli("eval", "demo", "--min-recovered", "0.81")
    assert outcome.code == 3
    assert "cls at keep 0.3: 0.800; allowed: >= 0.81" in outcome.err
    assert "spatial at" not in outcome.err
    assert "91.2" in outcome.out


def test_a_bar_without_an_unpruned_accuracy_is_not_met(run_cli, monkeypatch):
    report = EvaluationReport(rows=(row("none", "none", 0.0, None), row("cls", "gap", 0.0, None)))
    monkeypatch.setattr(accuracy, "evaluate_model", lambda *a, **k: report)
    outcome = run_cli("eval", "demo", "--min-recovered", "0")
    assert outcome.code == 3
    assert "cls at keep 0.3: unknown" in outcome.err
