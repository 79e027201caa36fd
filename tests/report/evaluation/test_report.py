"""Reports of evaluations: each format says what was measured, and nobody else's markup."""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from gap_export import extras
from gap_export.errors import MissingDependencyError, OutputError
from gap_export.evaluation import questions, results, settings
from gap_export.outputs import MARKDOWN_END, OutputRule
from gap_export.report.evaluation import (
    SCHEMA_FILE,
    check_writable,
    render_markdown,
    write_reports,
)
from gap_export.report.evaluation.words import p_value, panels
from gap_export.report.parity.markdown import escape
from gap_export.visible import clean
from tests.parity.reports import HOSTILE
from tests.report.evaluation.made_up import (
    evaluation_report,
    gallery_item,
    setting_row,
    unpruned_report,
    unusable,
    whole_row,
)
from tests.report.parity.test_report import names_in, rendered, set_in

SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def problems_of(plain):
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(plain)]


def plain_of(report):
    """Through JSON and back, as a reader has it."""
    return json.loads(json.dumps(report.to_plain(), allow_nan=False))


@pytest.mark.parametrize(
    "report",
    [evaluation_report(), evaluation_report(HOSTILE), unpruned_report()],
    ids=["full", "hostile", "least"],
)
def test_json_is_of_the_published_schema(report, tmp_path):
    Draft202012Validator.check_schema(SCHEMA)
    write_reports(report, json_path=tmp_path / "report.json")
    plain = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert problems_of(plain) == []
    assert plain == plain_of(report)
    assert [row["name"] for row in plain["rows"]] == [row.name for row in report.rows]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("schema",), "gap-export-check"),
        (("more",), 1),
        (("rows",), []),
        (("rows", 0, "keep_ratio"), 0),
        (("rows", 0, "positions"), "packed"),
        (("rows", 0, "acc_at_50"), 93.0),
        (("rows", 0, "ci95"), [0.9]),
        (("rows", 0, "n"), 0),
        (("rows", 1, "curve", "0.55"), 0.5),
        (("rows", 1, "by_kind", "attribute"), 0.5),
        (("rows", 1, "latency_ms", "total"), {"median": 1.0}),
        (("comparisons", 0, "mcnemar_p"), 1.5),
        (("data", "unusable", 0, "reason"), "lost"),
        (("gallery", 0, "box"), None),
        (("gallery", 0, "picture"), "/home/me/picture.jpg"),
        (("gallery", 0, "answers", 0, "box"), [1.0, 2.0]),
    ],
)
def test_schema_refuses_what_is_no_report(path, value):
    plain = plain_of(evaluation_report())
    assert problems_of(plain) == []
    set_in(plain, path, value)
    assert problems_of(plain)


def test_schema_asks_for_every_field_of_the_results():
    kinds = {
        "accuracy": results.Accuracy,
        "row": results.SettingRow,
        "comparison": results.Comparison,
        "data": results.DataSummary,
        "unusable": questions.Unusable,
        "gallery_answer": results.GalleryAnswer,
    }
    for name, kind in kinds.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        assert set(SCHEMA["$defs"][name]["required"]) == fields, name
        assert SCHEMA["$defs"][name]["properties"].keys() == fields, name
    item = {field.name for field in dataclasses.fields(results.GalleryItem)}
    assert set(SCHEMA["$defs"]["gallery_item"]["required"]) == item - {"picture"}
    top = {field.name for field in dataclasses.fields(results.EvaluationReport)}
    assert set(SCHEMA["required"]) == top | {"schema", "schema_version", "gap_export_version"}
    assert SCHEMA["properties"]["schema_version"]["const"] == results.SCHEMA_VERSION


@pytest.mark.parametrize(
    ("enum", "allowed"),
    [
        (SCHEMA["$defs"]["positions"]["enum"], settings.SettingPositions),
        (SCHEMA["$defs"]["unusable"]["properties"]["reason"]["enum"], questions.UnusableReason),
        (SCHEMA["$defs"]["gallery_item"]["properties"]["kind"]["enum"], results.GalleryKind),
    ],
)
def test_schema_names_all_there_are(enum, allowed):
    assert sorted(enum) == sorted(typing.get_args(allowed))


@pytest.mark.parametrize("text", ["the red circle", HOSTILE, "- - -", "1. x", "| a | b |", "=== "])
def test_markdown_renders_to_text_and_tables_alone(text):
    page = rendered(render_markdown(evaluation_report(text)))
    allowed = "h1 h2 ul li p strong table thead tbody tr th td".split()
    assert page.tags <= set(allowed)
    assert page.attributes == []
    assert " ".join(clean(text).split()) in " ".join(page.text.split())


def table_of(markdown, title):
    """Rows of the table below a title, cell by cell, as they are rendered."""
    lines = markdown.split(f"**{title}**")[1].split("\n\n")[1].splitlines()
    return [
        [rendered(cell).text.strip() for cell in line.strip("| ").split(" | ")] for line in lines
    ]


def test_markdown_says_what_was_measured_and_how():
    text = " ".join(rendered(render_markdown(evaluation_report())).text.split())
    for told in (
        "gap-export eval: refshapes-llava on refshapes",
        "Acc@0.5: unpruned 99.2 %; GAP 33.2 % to 93.0 %; compact positions 0.4 % to 2.2 %; ",
        "GAP recovers at least 33.5 % of unpruned.",
        "expressions: 500 about 63 pictures",
        "3 of the data set's 503 expressions. Counted as wrong: 2. Left out, since by their "
        "annotation no answer could be right: 1",
        "protocol: unpad: pixels of the original picture, plain IoU, > 0.5",
        "prompt: USER: <image> the red circle {expression} ASSISTANT:",
        "seed: 0",
        "backend: ONNX Runtime 1.32.0 (CPUExecutionProvider)",
        "percentile bootstrap over pictures",
        "every id from the first visual token on, by 6",
    ):
        assert told in text


def test_markdown_has_a_line_for_each_setting():
    markdown = render_markdown(evaluation_report())
    header, _, *rows = table_of(markdown, "Acc@0.5 by the protocol unpad")
    cells = dict(zip(header, rows[4], strict=True))
    assert len(rows) == 9
    assert cells == {
        "setting": "spatial keep 0.3 gap",
        "Acc@0.5": "93.0 %",
        "95 % interval": "90.0 to 95.5",
        "of unpruned": "93.8 %",
        "mean IoU": "0.744",
        "without a box": "3",
        "read with tolerance": "4",
        "out of scale": "0",
        "cut off": "0",
        "visual tokens": "43.2",
        "expressions": "500",
        "pictures": "63",
        "not asked": "2",
        "Acc@0.5 without those": "93.4 %",
    }


def test_doubts_come_first():
    report = evaluation_report(warnings=("out of scale: 57 of 60; <b>",))
    told = f"**Warning:** {escape('out of scale: 57 of 60; <b>')}"
    assert render_markdown(report).index(told) < 500
    assert plain_of(report)["warnings"] == ["out of scale: 57 of 60; <b>"]


def test_markdown_compares_settings_in_pairs():
    markdown = render_markdown(evaluation_report())
    rows = table_of(markdown, "two settings over the same expressions, counted at Acc@0.5")
    assert rows[2] == [
        *("random keep 0.3 gap", "random keep 0.3 compact", "8", "457", "0", "35", "+91.4"),
        *("+88.6 to +93.6", "< 1e-300"),
    ]
    assert rows[3][-1] == "5.4e-138"


def test_markdown_of_the_least_there_can_be_has_no_empty_table():
    markdown = render_markdown(unpruned_report())
    titles = [line for line in markdown.splitlines() if line.startswith("## ")]
    assert titles == ["## Accuracy"]
    text = rendered(markdown).text
    assert "could not be asked: none of the data set's expressions" in text
    assert "recovers" not in text


def test_a_split_alone_is_not_told_twice():
    one = {"heldout": setting_row().by_split["heldout"]}
    report = evaluation_report(rows=(whole_row(by_split=one), setting_row(by_split=one)))
    assert "Accuracy by split" not in render_markdown(report)
    assert "Accuracy by split" in render_markdown(evaluation_report())


def test_latency_names_the_backend_of_each_setting_where_they_differ():
    ort, trt = whole_row(), setting_row(backend="TensorRT 10.3 (Orin)")
    title = "milliseconds by stage: median / 95th percentile"
    header, _, row, other = table_of(render_markdown(evaluation_report(rows=(ort, trt))), title)
    assert header == [
        *("setting", "backend", "expressions a batch"),
        *("vision_encoder", "prefill", "decode", "total"),
    ]
    assert row[1] == "ONNX Runtime 1.32.0 (CPUExecutionProvider)"
    assert other[1:3] == ["TensorRT 10.3 (Orin)", "7.9"]
    assert other[-1] == "61.2 / 70.1"
    assert "backend" not in table_of(render_markdown(evaluation_report()), title)[0]


def test_expressions_that_cannot_be_asked_are_counted_by_reason_and_listed():
    many = tuple(unusable(text=str(number)) for number in range(60))
    data = dataclasses.replace(evaluation_report().data, unusable=(*many, unusable("empty box")))
    markdown = render_markdown(evaluation_report(data=data))
    assert table_of(markdown, "expressions by reason")[2:] == [
        ["missing picture", "60", "counted as wrong"],
        ["empty box", "1", "left out"],
    ]
    assert ["17-3", "heldout", "missing picture", "images/3.jpg"] in table_of(
        markdown, "each of them"
    )
    assert "11 more are left out here." in markdown


def test_panels_hold_each_configuration_beside_the_unpruned_model():
    found = [(panel.title, [row.positions for row in panel.rows]) for panel in panels_of()]
    assert found == [
        ("random keep 0.3", ["none", "compact", "gap"]),
        ("spatial keep 0.3", ["none", "compact", "gap"]),
        ("spatial keep 0.1", ["none", "compact", "gap"]),
        ("no token dropped", ["none", "permuted", "shifted"]),
    ]
    assert [panel.title for panel in panels(unpruned_report().rows)] == ["unpruned"]


def panels_of():
    return panels(evaluation_report().rows)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "1.000"), (0.0104, "0.010"), (9.9e-4, "9.9e-04"), (0.0, "< 1e-300")],
)
def test_p_value_keeps_what_can_be_told(value, shown):
    assert p_value(value) == shown


def test_rows_of_another_model_are_refused_and_nothing_is_written(tmp_path):
    trained = setting_row(model="refshapes-llava-dropout")
    report = evaluation_report(rows=(whole_row(), trained))
    with pytest.raises(ValueError, match="refshapes-llava-dropout in a report of refshapes-llava"):
        write_reports(report, json_path=tmp_path / "a.json", markdown_path=tmp_path / "a.md")
    assert names_in(tmp_path) == []


def test_reports_replace_earlier_ones_and_are_not_changed_by_writing(tmp_path):
    report = evaluation_report()
    before = copy.deepcopy(report.to_plain())
    write_reports(report, markdown_path=tmp_path / "report.md")
    write_reports(report, json_path=tmp_path / "report.json", markdown_path=tmp_path / "report.md")
    assert names_in(tmp_path) == ["report.json", "report.md"]
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert written == render_markdown(report) + MARKDOWN_END
    assert report.to_plain() == before


def test_places_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(OutputError, match="the HTML report is to be in a folder that does not"):
        check_writable(html_path=tmp_path / "no" / "report.html")
    with pytest.raises(OutputError, match="two outputs would be one file: the JSON report and"):
        check_writable(json_path=tmp_path / "a", markdown_path=tmp_path / "a")
    with pytest.raises(OutputError, match="would be inside the bundle"):
        check_writable(
            json_path=tmp_path / "a.json", rule=OutputRule(outside={"the bundle": tmp_path})
        )


def test_a_report_is_added_to_the_summary_of_a_github_step(tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    write_reports(evaluation_report(), markdown_path=summary)
    one = summary.read_text()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    write_reports(evaluation_report(), markdown_path=summary)
    assert summary.read_text() == f"{one}\n{one}"


def test_a_page_without_its_extra_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "_is_installed", lambda name: name != "jinja2")
    with pytest.raises(MissingDependencyError, match=r"jinja2; .*pip install .*\[report\]"):
        write_reports(evaluation_report(), html_path=tmp_path / "report.html")
    write_reports(evaluation_report(), markdown_path=tmp_path / "report.md")


def test_pictures_are_no_part_of_json_and_markdown(tmp_path):
    item = gallery_item(picture=questions.PictureSource(path=Path("/no/such/picture.jpg")))
    report = evaluation_report(gallery=(item,))
    assert "/no/such" not in json.dumps(report.to_plain())
    assert "such" not in render_markdown(report)
