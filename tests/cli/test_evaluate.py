"""``gap-export eval``, on measured rows that are made up here."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest

from gap_export.evaluation import evaluate
from gap_export.evaluation.evaluate import Asking
from gap_export.evaluation.questions import Unusable
from gap_export.evaluation.results import DataSummary, EvaluationReport, SettingRow
from gap_export.exporting import ExportOptions
from gap_export.outputs import NO_RULE
from gap_export.spec.requests import BackendOptions, PruningRequest
from gap_export.stop_signals import Stopped


def row(pruner, positions, value, recovered, **changes):
    plain = {
        "name": f"{pruner} {positions}",
        "model": "refshapes-llava",
        "pruner": pruner,
        "keep_ratio": 1.0 if pruner == "none" else 0.3,
        "positions": positions,
        "seed": 0,
        "protocol": "unpad",
        "n": 500,
        "num_images": 125,
        "acc_at_50": value,
        "ci95": (value - 0.02, value + 0.02),
        "mean_iou": 0.5,
        "parse_failures": 3,
        "recovered": recovered,
        "mean_visual_tokens": 144.0 if pruner == "none" else 43.0,
    }
    return SettingRow(**{**plain, **changes})


def report_of(*rows, **changes):
    plain = {
        "model": "refshapes-llava",
        "family": "llava",
        "data": DataSummary(
            spec="refshapes",
            name="refshapes",
            layout="refshapes",
            splits=("heldout",),
            num_expressions=500,
            num_images=125,
        ),
        "protocol": "unpad",
        "protocol_summary": "IoU > 0.5",
        "prompt": "<image> {expression}",
        "seed": 0,
        "backend": "onnxruntime",
        "rows": rows,
    }
    return EvaluationReport(**{**plain, **changes})


REPORT = report_of(
    row("none", "none", 0.96, None),
    row("spatial", "compact", 0.04, 0.04),
    row("spatial", "gap", 0.912, 0.95),
    row("cls", "compact", 0.04, 0.04),
    row("cls", "gap", 0.768, 0.8),
)


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the evaluations asked for."""
    seen = []

    def record(target, **arguments):
        del arguments["progress"]
        seen.append((target, arguments))
        return REPORT

    monkeypatch.setattr(evaluate, "evaluate_model", record)
    monkeypatch.setattr(evaluate, "evaluate_bundle", record)
    return seen


@pytest.fixture
def bundle(tmp_path):
    """Looks like a bundle from outside."""
    (tmp_path / "gap.json").write_text("{}")
    return tmp_path


def test_every_flag_of_a_model_reaches_the_evaluation(run_cli, calls):
    flags = "--pruner cls,spatial --pruner cls --keep 0.3 --keep 0.5 --order score --seed 3 "
    flags += "--extra-token mean --extra-position centroid --budget fixed --pruner-text question "
    flags += "--checkpoint weights --checkpoint base=llm --dtype float16 --recipe llava"
    flags += " --pictures drawn --data refcoco:coco:val --samples 20 --protocol lmms --records kept"
    flags += " --misaligned shifted,permuted --misaligned shifted --workers auto"
    run_cli("eval", "demo", *flags.split(), "--prompt", "<image> {expression}?")
    pruning = PruningRequest(
        order="score",
        extra_token="mean",
        extra_position="centroid",
        budget="fixed",
        pruner_text="question",
        seed=3,
    )
    options = ExportOptions(
        model="demo",
        pruning=PruningRequest(seed=3),
        recipe="llava",
        checkpoint={"main": Path("weights"), "base": Path("llm")},
        dtype="float16",
    )
    arguments = {
        "prunings": pruning.variants(["cls", "spatial"], [0.3, 0.5]),
        "num_samples": 20,
        "asking": Asking(
            data="refcoco:coco:val",
            protocol="lmms",
            prompt="<image> {expression}?",
            misaligned=("shifted", "permuted"),
            records=Path("kept"),
            workers="auto",
            pictures=Path("drawn"),
            rule=ANY,
        ),
    }
    assert calls == [(options, arguments)]


def test_nothing_but_the_model_needs_to_be_said(run_cli, calls):
    run_cli("eval", "demo")
    asking = Asking(rule=ANY)
    arguments = {"prunings": (PruningRequest(),), "num_samples": None, "asking": asking}
    assert calls == [(ExportOptions(model="demo"), arguments)]


def test_every_flag_of_a_bundle_reaches_the_evaluation(run_cli, calls, bundle, tmp_path):
    flags = "--baseline whole --samples 20 --backend trt --engines rtx-sm89"
    run_cli("eval", bundle, *flags.split())
    arguments = {
        "baseline": Path("whole"),
        "checkpoint": {},
        "seed": 0,
        "num_samples": 20,
        "asking": Asking(),
        "backend": "tensorrt",
        "options": BackendOptions(engines="rtx-sm89"),
    }
    ((asked, given),) = calls
    rule = given["asking"].rule
    assert rule.outside == {"the bundle": bundle, "the baseline": Path("whole")}
    given["asking"] = replace(given["asking"], rule=NO_RULE)
    assert (asked, given) == (bundle, arguments)


def test_the_table_prints_percent_and_json_shares(run_cli, calls):
    lines = run_cli("eval", "demo").out.splitlines()
    assert "500 expressions, 125 images" in lines[0]
    assert lines[1] == "protocol unpad: IoU > 0.5"
    table = [line.split() for line in lines[6:]]
    assert table[0] == ["none", "1", "144", "none", "96.0", "94.0-98.0", "-", "50.0", "3"]
    assert table[2] == ["spatial", "0.3", "43", "gap", "91.2", "89.2-93.2", "95.0", "50.0", "3"]
    assert len(table) == 5

    plain = run_cli("eval", "demo", "--json").plain
    assert plain["schema"] == "gap-export-evaluation"
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
    report = report_of(row("none", "none", 0.0, None), row("cls", "gap", 0.0, None))
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *a, **k: report)
    outcome = run_cli("eval", "demo", "--min-recovered", "0")
    assert outcome.code == 3
    assert "cls at keep 0.3: unknown" in outcome.err


@pytest.mark.parametrize(("flags", "code"), [((), 3), (("--min-recovered", "0.5"), 0)])
def test_a_doubtful_measurement_exits_3_where_nothing_else_is_asked(
    run_cli, monkeypatch, flags, code
):
    doubt = "unpruned, out of scale: 57 of 60; the answers look like pixels"
    rows = (replace(REPORT.rows[0], n=60, num_out_of_scale=57, num_cut_off=2), *REPORT.rows[1:])
    report = replace(REPORT, rows=rows, warnings=(doubt,))
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *_, **__: report)
    outcome = run_cli("eval", "demo", *flags)
    assert outcome.code == code
    assert ("error: " if code else "warning: ") + doubt in outcome.err
    assert "none none: out of scale: 57 of 60\nnone none: cut off: 2 of 60" in outcome.out
    plain = run_cli("eval", "demo", "--json", *flags).plain
    assert plain["warnings"] == [doubt]
    assert (plain["rows"][0]["num_out_of_scale"], plain["rows"][0]["num_cut_off"]) == (57, 2)


def test_what_could_not_be_asked_is_told(run_cli, monkeypatch):
    unusable = [
        Unusable(question_id=str(n), image_id="i", split="val", kind=None, reason=reason, detail="")
        for n, reason in enumerate(["missing picture", "missing picture", "empty box"])
    ]
    data = DataSummary(
        spec="refcoco:coco:val",
        name="refcoco",
        layout="refer",
        splits=("val",),
        num_expressions=503,
        num_images=125,
        num_excluded=1,
        unusable=tuple(unusable),
    )
    rows = [
        row("none", "none", 0.5, None, name="unpruned", num_unusable=5, acc_at_50_usable=0.505),
        row("none", "shifted", 0.0, None, name="shifted", num_unusable=0, acc_at_50_usable=0.0),
    ]
    report = report_of(*rows, data=data, misalignments={"shifted": "ids are 6 higher"})
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *a, **k: report)
    out = run_cli("eval", "demo").out
    assert "refshapes-llava on refcoco, val" in out
    assert "2 expressions not asked, and counted as wrong: missing picture 2\n" in out
    assert "1 expression left out, annotated so that no answer could be right" in out
    assert "unpruned: 50.5 % of the others; 5 could not be asked\n" in out
    assert "shifted: ids are 6 higher" in out


def test_reports_are_written_beside_the_table(run_cli, calls, tmp_path):
    files = {name: tmp_path / f"report.{name}" for name in ("json", "md")}
    outcome = run_cli("eval", "demo", "--report-json", files["json"], "--markdown", files["md"])
    assert (outcome.code, outcome.out.splitlines()[0][:15]) == (0, "refshapes-llava")
    assert json.loads(files["json"].read_text()) == REPORT.to_plain()
    assert "91.2" in files["md"].read_text()


@pytest.mark.parametrize("option", ["--records", "--pictures"])
def test_folders_inside_a_bundle_are_refused(run_cli, calls, bundle, option):
    outcome = run_cli("eval", bundle, option, bundle / "below")
    assert (outcome.code, calls) == (2, [])
    assert f"{option} would be inside the bundle" in outcome.err
    run_cli("eval", "demo", option, bundle.parent / f"{bundle.name}-beside")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--records", "kept"], "the same command goes on from there"),
        ([], "--records DIR would have kept them"),
    ],
)
def test_an_interruption_says_how_to_go_on(run_cli, monkeypatch, flags, told):
    def stop(*args, **options):
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(evaluate, "evaluate_model", stop)
    outcome = run_cli("eval", "demo", *flags)
    assert outcome.code == 130
    assert told in outcome.err


@pytest.mark.parametrize("option", ["--report-json", "--markdown", "--html"])
@pytest.mark.parametrize("spec", ["{}", "{}:val", "refcoco:{}:val", "refcoco:{}"])
def test_annotations_that_are_read_are_never_replaced(run_cli, calls, tmp_path, option, spec):
    questions = tmp_path / "set" / "questions.jsonl"
    questions.parent.mkdir()
    questions.write_text("{}\n")
    os.link(questions, tmp_path / "elsewhere")
    data = ["--data", spec.format(questions.parent)]
    for path in (questions, tmp_path / "elsewhere"):
        for force in ([], ["--force"]):
            outcome = run_cli("eval", "demo", *data, option, path, *force)
            assert (outcome.code, calls) == (2, [])
            assert "would replace a file that the command reads: --data" in outcome.err
    assert questions.read_text() == "{}\n"


@pytest.mark.parametrize("option", ["--report-json", "--markdown", "--html"])
def test_a_file_of_the_user_s_is_replaced_only_with_force(run_cli, calls, tmp_path, option):
    notes = tmp_path / "notes"
    notes.write_text("mine")
    outcome = run_cli("eval", "demo", option, notes)
    assert (outcome.code, calls) == (2, [])
    assert "that gap-export did not write" in outcome.err and "--force" in outcome.err
    assert notes.read_text() == "mine"
    assert run_cli("eval", "demo", option, notes, "--force").code == 0
    assert run_cli("eval", "demo", option, notes).code == 0


def test_a_folder_s_name_cannot_write_to_the_terminal(run_cli, monkeypatch):
    data = replace(REPORT.data, name="red\x1b[31m")
    report = replace(REPORT, data=data)
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *a, **k: report)
    assert "\x1b" not in run_cli("eval", "demo").out


def test_a_target_that_no_file_can_have_is_no_bundle(run_cli, calls):
    run_cli("eval", "a" * 5000)
    assert [target.model for target, _ in calls] == ["a" * 5000]
