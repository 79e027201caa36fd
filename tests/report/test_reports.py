"""Reports of both kinds: each format holds what was found, and no markup of anyone else."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import typing
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from jsonschema import Draft202012Validator

from gap_export import extras
from gap_export.errors import MissingDependencyError, OutputError
from gap_export.evaluation import questions, settings
from gap_export.evaluation import results as measured
from gap_export.outputs import MARKDOWN_END, OutputRule
from gap_export.parity import results as checked
from gap_export.report import (
    CHECK_SCHEMA,
    EVALUATION_SCHEMA,
    check_writable,
    document_of,
    write_reports,
)
from gap_export.report.markdown import to_markdown
from gap_export.visible import clean
from tests.report.made_up_checks import HOSTILE, check_report, passing_report
from tests.report.made_up_evaluations import (
    evaluation_report,
    gallery_item,
    setting_row,
    unpruned_report,
    whole_row,
)
from tests.report.reading import rendered

SCHEMAS = {
    "check": json.loads(CHECK_SCHEMA.read_text(encoding="utf-8")),
    "eval": json.loads(EVALUATION_SCHEMA.read_text(encoding="utf-8")),
}
MADE_UP = {"check": check_report, "eval": evaluation_report}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def problems_of(kind, plain):
    return [error.message for error in Draft202012Validator(SCHEMAS[kind]).iter_errors(plain)]


@pytest.mark.parametrize(
    ("kind", "report"),
    [
        ("check", check_report()),
        ("check", check_report(HOSTILE)),
        ("check", passing_report()),
        ("eval", evaluation_report()),
        ("eval", evaluation_report(HOSTILE)),
        ("eval", unpruned_report()),
    ],
)
def test_json_is_of_the_published_schema(kind, report, tmp_path):
    Draft202012Validator.check_schema(SCHEMAS[kind])
    write_reports(report, json=tmp_path / "report.json")
    plain = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert problems_of(kind, plain) == []
    assert plain == json.loads(json.dumps(report.to_plain(), allow_nan=False))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("check", ("schema_version",), 2),
        ("check", ("schema",), "other"),
        ("check", ("passed",), "yes"),
        ("check", ("keep_ratio",), 0),
        ("check", ("more",), 1),
        ("check", ("backends", 0, "backend"), "cuda"),
        ("check", ("backends", 0, "levels", 0, "status"), "skipped"),
        ("check", ("backends", 0, "levels", 1, "rows", 0, "calls"), 1.5),
        ("check", ("backends", 0, "levels", 0, "rows", 0), {"expression": "x", "iou": 1.0}),
        ("check", ("backends", 0, "levels", 4, "rows"), [{}]),
        ("check", ("backends", 0, "divergences", 0, "module"), None),
        ("check", ("backends", 0, "levels", 2, "figures", "equal"), "47"),
        ("eval", ("schema_version",), 2),
        ("eval", ("schema",), "gap-export-check"),
        ("eval", ("more",), 1),
        ("eval", ("rows",), []),
        ("eval", ("rows", 0, "keep_ratio"), 0),
        ("eval", ("rows", 0, "positions"), "packed"),
        ("eval", ("rows", 0, "acc_at_50"), 93.0),
        ("eval", ("rows", 0, "ci95"), [0.9]),
        ("eval", ("rows", 0, "n"), 0),
        ("eval", ("rows", 1, "curve", "0.55"), 0.5),
        ("eval", ("rows", 1, "by_kind", "attribute"), 0.5),
        ("eval", ("rows", 1, "latency_ms", "total"), {"median": 1.0}),
        ("eval", ("comparisons", 0, "mcnemar_p"), 1.5),
        ("eval", ("data", "unusable", 0, "reason"), "lost"),
        ("eval", ("gallery", 0, "box"), None),
        ("eval", ("gallery", 0, "image"), "/home/me/image.jpg"),
        ("eval", ("gallery", 0, "answers", 0, "box"), [1.0, 2.0]),
    ],
)
def test_schema_refuses_what_is_no_report(kind, path, value):
    plain = json.loads(json.dumps(MADE_UP[kind]().to_plain()))
    *parents, last = path
    inner = plain
    for key in parents:
        inner = inner[key]
    inner[last] = value
    assert problems_of(kind, plain)


@pytest.mark.parametrize(
    ("kind", "name", "of"),
    [
        ("check", "positions_row", checked.PositionsRow),
        ("check", "tensor_row", checked.TensorRow),
        ("check", "divergence", checked.Divergence),
        ("check", "token_row", checked.TokenRow),
        ("check", "box_row", checked.BoxRow),
        ("check", "level", checked.LevelResult),
        ("check", "backend", checked.BackendResult),
        ("eval", "accuracy", measured.Accuracy),
        ("eval", "row", measured.SettingRow),
        ("eval", "absence", measured.Absence),
        ("eval", "comparison", measured.Comparison),
        ("eval", "data", measured.DataSummary),
        ("eval", "unusable", questions.Unusable),
        ("eval", "gallery_answer", measured.GalleryAnswer),
        ("eval", "gallery_item", measured.GalleryItem),
    ],
)
def test_schema_asks_for_every_field_of_the_results(kind, name, of):
    fields = {field.name for field in dataclasses.fields(of)} - {"image"}
    assert set(SCHEMAS[kind]["$defs"][name]["required"]) == fields
    assert SCHEMAS[kind]["$defs"][name]["properties"].keys() == fields


def test_schemas_ask_for_every_field_at_the_top_and_name_all_there_are():
    check, evaluation = SCHEMAS["check"], SCHEMAS["eval"]
    for schema, report, more in (
        (check, checked.CheckReport, {"passed"}),
        (evaluation, measured.EvaluationReport, {"gap_export_version"}),
    ):
        top = {field.name for field in dataclasses.fields(report)}
        assert set(schema["required"]) == top | more | {"schema", "schema_version"}
    versions = [each["properties"]["schema_version"]["const"] for each in (check, evaluation)]
    assert versions == [checked.SCHEMA_VERSION, measured.SCHEMA_VERSION]
    kinds = evaluation["$defs"]
    for enum, allowed in (
        (check["$defs"]["level_name"]["enum"], checked.LEVELS),
        (kinds["positions"]["enum"], typing.get_args(settings.SettingPositions)),
        (
            kinds["unusable"]["properties"]["reason"]["enum"],
            typing.get_args(questions.UnusableReason),
        ),
        (
            kinds["gallery_item"]["properties"]["kind"]["enum"],
            typing.get_args(measured.GalleryKind),
        ),
    ):
        assert sorted(enum) == sorted(allowed)


@pytest.mark.parametrize("kind", MADE_UP)
@pytest.mark.parametrize("text", ["the red circle", HOSTILE, "- - -", "1. x", "| a | b |", "=== "])
def test_markdown_renders_to_text_and_tables_alone(kind, text):
    page = rendered(to_markdown(document_of(MADE_UP[kind](text))))
    assert page.tags <= set("h1 h2 h3 ul li p strong table thead tbody tr th td".split())
    # A column of numbers is aligned at the right.
    assert set(page.attributes) <= {("style", "text-align:right")}
    # Its lines are one: a table's row has no room for more.
    assert " ".join(clean(text).split()) in page.line


@pytest.mark.parametrize("kind", MADE_UP)
def test_reports_replace_earlier_ones_and_are_not_changed_by_writing(kind, tmp_path):
    report = MADE_UP[kind]("x" * 100_000)
    before = copy.deepcopy(report.to_plain())
    names = ("json", "markdown", *(["junit"] if kind == "check" else []))
    places = {name: tmp_path / f"report.{name}" for name in names}
    for each in (MADE_UP[kind](), report):
        write_reports(each, **places)
    assert names_in(tmp_path) == sorted(path.name for path in places.values())
    assert report.to_plain() == before
    written = places["markdown"].read_text(encoding="utf-8")
    assert written == to_markdown(document_of(report)) + MARKDOWN_END
    # Long text is cut where people read it.
    assert len(written) < 200_000
    write_reports(report)


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    inside = OutputRule(outside={"the bundle": tmp_path})
    for places, message in (
        ({"json": tmp_path / "no" / "a"}, r"a folder that does not exist: .*/no; create the"),
        ({"html": tmp_path / "no" / "a"}, r"the HTML report is to be in a folder that does not"),
        ({"json": tmp_path / "file" / "a"}, r"in something that is no folder: .*/file"),
        ({"json": tmp_path}, r"the JSON report is a file, and this is a folder"),
        ({"json": tmp_path / "pipe"}, r"would replace what is not a plain file"),
        ({"json": tmp_path / ("x" * 300)}, r"JSON report cannot be written there: .*too long"),
        ({"json": Path("a\0b")}, r"cannot be written there: 'a\\x00b'"),
        (
            {"json": tmp_path / "a", "markdown": tmp_path / "x" / ".." / "a"},
            "two outputs would be one file: the JSON report and",
        ),
        ({"json": tmp_path / "a", "rule": inside}, "would be inside the bundle"),
    ):
        with pytest.raises(OutputError, match=message):
            check_writable(**places)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="in a folder that cannot be written"):
        check_writable(junit=tmp_path / "report.xml")


def test_a_disk_that_is_full_leaves_the_old_report(tmp_path, monkeypatch):
    write_reports(check_report(), json=tmp_path / "report.json")
    before = (tmp_path / "report.json").read_bytes()
    full = OSError(28, "No space left on device")

    def fail(*args, **options):
        raise full

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match=r"the JSON report cannot be written: .*No space left"):
        write_reports(passing_report(), json=tmp_path / "report.json")
    assert names_in(tmp_path) == ["report.json"]
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_report_is_added_to_the_summary_of_a_github_step(tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    write_reports(evaluation_report(), markdown=summary)
    one = summary.read_text()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    write_reports(evaluation_report(), markdown=summary)
    assert summary.read_text() == f"{one}\n{one}"


@pytest.mark.parametrize("lacking", ["jinja2", "matplotlib"])
def test_a_page_without_its_extra_is_refused_with_what_to_install(tmp_path, monkeypatch, lacking):
    monkeypatch.setattr(extras, "_is_installed", lambda name: name != lacking)
    with pytest.raises(MissingDependencyError, match=rf"{lacking}; .*pip install .*\[report\]"):
        write_reports(check_report(), html=tmp_path / "report.html")
    write_reports(check_report(), markdown=tmp_path / "report.md")


def test_rows_of_another_model_are_refused_and_nothing_is_written(tmp_path):
    trained = setting_row(model="refshapes-llava-dropout")
    report = evaluation_report(rows=(whole_row(), trained))
    with pytest.raises(ValueError, match="refshapes-llava-dropout in a report of refshapes-llava"):
        write_reports(report, json=tmp_path / "a.json", markdown=tmp_path / "a.md")
    assert names_in(tmp_path) == []


def test_images_are_no_part_of_json_and_markdown():
    item = gallery_item(image=questions.ImageSource(path=Path("/no/such/image.jpg")))
    report = evaluation_report(gallery=(item,))
    assert "/no/such" not in json.dumps(report.to_plain())
    assert "such" not in to_markdown(document_of(report))


def test_json_of_numbers_that_are_not_finite_is_json():
    row = check_report().to_plain()["backends"][0]["levels"][1]["rows"][2]
    assert (row["max_abs_diff"], row["cosine"], row["num_nonfinite"]) == (None, None, 12)


def junit_of(report, tmp_path):
    write_reports(report, junit=tmp_path / "report.xml")
    return ET.parse(tmp_path / "report.xml").getroot()


def test_junit_has_a_case_for_each_backend_and_level(tmp_path):
    root = junit_of(check_report(), tmp_path)
    assert root.tag == "testsuites"
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("10", "4", "5")
    ort, trt = root.findall("testsuite")
    for suite in (ort, trt):
        cases = suite.findall("testcase")
        assert [case.get("name") for case in cases] == list(checked.LEVELS)
        assert int(suite.get("tests")) == len(cases)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped"))
    assert ort.get("time") == "12.500"
    names = {case.get("classname") for case in root.iter("testcase")}
    assert names == {"gap-export.refshapes-llava.ort", "gap-export.refshapes-llava.trt"}
    assert {s.get("message") for s in trt.iter("skipped")} == {"no GPU on this machine"}
    tensor = ort.findall("testcase")[1].find("failure")
    assert tensor.get("message").startswith("decoder_model_merged logits")
    assert "MatMul node_MatMul_17 of module layers.5.self_attn.q_proj" in tensor.text
    assert "tensor: logits (decode)" in tensor.text
    assert "image_features" not in tensor.text
    assert ort.findall("testcase")[4].find("failure") is None


def test_junit_of_a_required_backend_that_was_not_run_fails(tmp_path):
    root = junit_of(check_report(required=("trt",)), tmp_path)
    assert (root.get("failures"), root.get("skipped")) == ("9", "0")
    failure = root.findall("testsuite")[1].find("testcase/failure")
    assert failure.get("message") == "not run, and it had to be: no GPU on this machine"


def test_a_report_of_nothing_run_is_green_in_no_format(tmp_path):
    nothing = check_report(backends=check_report().backends[1:])
    assert not nothing.to_plain()["passed"]
    assert junit_of(nothing, tmp_path).get("failures") == "5"
    markdown = to_markdown(document_of(nothing))
    assert "# gap-export check: not run" in markdown
    assert "TensorRT was asked for and not run: no GPU" in markdown


def test_junit_keeps_hostile_text_apart_from_its_own(tmp_path):
    root = junit_of(check_report(HOSTILE), tmp_path)
    assert {element.tag for element in root.iter()} == {
        *("testsuites", "testsuite", "testcase", "properties", "property", "failure", "skipped"),
        "system-out",
    }
    case = root.find("testsuite/testcase")
    # Newlines become spaces in an attribute, and stay in a text.
    assert case.find("failure").get("message").split() == clean(HOSTILE).split()
    assert clean(HOSTILE) in case.find("failure").text
    assert "\\x00\\x1b[31m\\u202e\\ud800" in clean(HOSTILE)
