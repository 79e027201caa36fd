"""Reports of a check: each format says what was found, and says it to a reader of that format."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from jsonschema import Draft202012Validator
from markdown_it import MarkdownIt

from gap_export import extras
from gap_export.errors import MissingDependencyError, OutputError
from gap_export.parity import results
from gap_export.report.parity import SCHEMA_FILE, check_writable, write_reports
from gap_export.visible import clean
from tests.parity.reports import HOSTILE, check_report, passing_report

SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
VISIBLE = clean(HOSTILE)


@pytest.fixture
def written(tmp_path):
    """Writes a report in the formats that need no extra; gives their texts."""

    def write(report):
        paths = {name: tmp_path / f"report.{name}" for name in ("json", "junit", "markdown")}
        write_reports(report, **paths)
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}

    return write


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def problems_of(plain):
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(plain)]


@pytest.mark.parametrize(
    "report",
    [check_report(), check_report(HOSTILE), passing_report()],
    ids=["failed", "hostile", "passed"],
)
def test_json_is_of_the_published_schema(report, written):
    Draft202012Validator.check_schema(SCHEMA)
    plain = json.loads(written(report)["json"])
    assert problems_of(plain) == []
    assert plain["passed"] is report.passed
    assert plain["bundle"] == report.bundle


def set_in(plain, path, value):
    *parents, last = path
    for key in parents:
        plain = plain[key]
    plain[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("schema",), "other"),
        (("passed",), "yes"),
        (("keep_ratio",), 0),
        (("more",), 1),
        (("backends", 0, "backend"), "cuda"),
        (("backends", 0, "levels", 0, "status"), "skipped"),
        (("backends", 0, "levels", 1, "rows", 0, "calls"), 1.5),
        (("backends", 0, "levels", 0, "rows", 0), {"expression": "x", "iou": 1.0}),
        (("backends", 0, "levels", 4, "rows"), [{}]),
        (("backends", 0, "divergences", 0, "module"), None),
        (("backends", 0, "levels", 2, "figures", "equal"), "47"),
    ],
)
def test_schema_refuses_what_is_no_report(path, value):
    plain = check_report().to_plain()
    assert problems_of(plain) == []
    set_in(plain, path, value)
    assert problems_of(plain)


def test_schema_asks_for_every_field_of_the_results():
    kinds = {
        "positions_row": results.PositionsRow,
        "tensor_row": results.TensorRow,
        "divergence": results.Divergence,
        "token_row": results.TokenRow,
        "box_row": results.BoxRow,
        "level": results.LevelResult,
        "backend": results.BackendResult,
    }
    for name, kind in kinds.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        assert set(SCHEMA["$defs"][name]["required"]) == fields, name
        assert SCHEMA["$defs"][name]["properties"].keys() == fields, name
    top = {field.name for field in dataclasses.fields(results.CheckReport)}
    assert set(SCHEMA["required"]) == top | {"schema", "schema_version", "passed"}
    assert SCHEMA["properties"]["schema_version"]["const"] == results.SCHEMA_VERSION
    assert SCHEMA["$defs"]["level_name"]["enum"] == list(results.LEVELS)


def test_json_of_numbers_that_are_not_finite_is_json(written):
    rows = json.loads(written(check_report())["json"])["backends"][0]["levels"][1]["rows"]
    assert (rows[2]["max_abs_diff"], rows[2]["cosine"], rows[2]["num_nonfinite"]) == (
        None,
        None,
        12,
    )


def test_junit_has_a_case_for_each_backend_and_level(written):
    root = ET.fromstring(written(check_report())["junit"])
    assert root.tag == "testsuites"
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("10", "4", "5")
    ort, trt = root.findall("testsuite")
    for suite in (ort, trt):
        cases = suite.findall("testcase")
        assert [case.get("name") for case in cases] == list(results.LEVELS)
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


def test_junit_of_a_required_backend_that_was_not_run_fails(written):
    required = check_report(required=("trt",))
    root = ET.fromstring(written(required)["junit"])
    assert (root.get("failures"), root.get("skipped")) == ("9", "0")
    failure = root.findall("testsuite")[1].find("testcase/failure")
    assert failure.get("message") == "not run, and it had to be: no GPU on this machine"


def test_a_report_of_nothing_run_is_green_in_no_format(written):
    nothing = check_report(backends=check_report().backends[1:])
    texts = written(nothing)
    assert not json.loads(texts["json"])["passed"]
    assert ET.fromstring(texts["junit"]).get("failures") == "5"
    assert "# gap-export check: not run" in texts["markdown"]
    assert "TensorRT was asked for and not run: no GPU" in texts["markdown"]


def test_junit_keeps_hostile_text_apart_from_its_own(written):
    root = ET.fromstring(written(check_report(HOSTILE))["junit"])
    assert {element.tag for element in root.iter()} == {
        *("testsuites", "testsuite", "testcase", "properties", "property", "failure", "skipped"),
        "system-out",
    }
    case = root.find("testsuite/testcase")
    # Newlines become spaces in an attribute, and stay in a text.
    assert case.find("failure").get("message").split() == VISIBLE.split()
    assert VISIBLE in case.find("failure").text
    assert "\\x00\\x1b[31m\\u202e\\ud800" in VISIBLE


class Page(HTMLParser):
    """Tags, attributes and text of HTML."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def rendered(markdown):
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


@pytest.mark.parametrize("text", ["the red circle", HOSTILE, "- - -", "1. x", "| a | b |", "=== "])
def test_markdown_renders_to_text_and_tables_alone(written, text):
    page = rendered(written(check_report(text))["markdown"])
    allowed = "h1 h2 h3 ul li p strong table thead tbody tr th td".split()
    assert page.tags <= set(allowed)
    assert page.attributes == []
    # Its lines are one: a table's row has no room for more.
    assert " ".join(clean(text).split()) in " ".join(page.text.split())


def test_markdown_says_what_is_wrong_and_leaves_out_layers_that_are_right(written):
    text = written(check_report())["markdown"]
    assert text.startswith("# gap-export check: FAILED\n")
    page = rendered(text)
    assert "first diverges at /layers.5/self_attn/the red circle" in page.text
    assert "IoU over 0.95: 94.0 %" in page.text
    assert page.text.count("no GPU on this machine") == 1
    assert "/layers.6/" in page.text
    assert "/layers.4/self_attn" not in page.text
    assert "# gap-export check: passed" in written(passing_report())["markdown"]


def test_reports_replace_earlier_ones_and_leave_nothing_else(tmp_path):
    places = {
        "json": tmp_path / "report.json",
        "junit": tmp_path / "report.xml",
        "markdown": tmp_path / "report.md",
        "html": tmp_path / "report.html",
    }
    for report in (check_report(), passing_report()):
        write_reports(report, **places)
    assert names_in(tmp_path) == ["report.html", "report.json", "report.md", "report.xml"]
    assert (tmp_path / "report.md").read_text().startswith("# gap-export check: passed")
    write_reports(passing_report())


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "no" / "report.json", r"a folder that does not exist: .*/no; create the"),
        (tmp_path / "file" / "report.json", r"in something that is no folder: .*/file"),
        (tmp_path, r"the JSON report is a file, and this is a folder"),
        (tmp_path / "pipe", r"would replace what is not a plain file"),
        (tmp_path / ("x" * 300), r"JSON report cannot be written there: .*too long"),
        (Path("a\0b"), r"cannot be written there: 'a\\x00b'"),
    ):
        with pytest.raises(OutputError, match=message):
            check_writable(json=path)
    with pytest.raises(OutputError, match="two outputs would be one file: the JSON report and"):
        check_writable(json=tmp_path / "a", markdown=tmp_path / "x" / ".." / "a")
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


def test_a_page_without_its_extra_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "_is_installed", lambda name: name != "matplotlib")
    with pytest.raises(MissingDependencyError, match=r"matplotlib; .*pip install .*\[report\]"):
        check_writable(html=tmp_path / "report.html")
    check_writable(json=tmp_path / "report.json")


def test_long_text_is_cut_and_a_report_is_not_changed_by_writing_it(written):
    report = check_report("x" * 100_000)
    before = copy.deepcopy(report.to_plain())
    texts = written(report)
    assert report.to_plain() == before
    assert len(texts["markdown"]) < 100_000
    assert ET.fromstring(texts["junit"])
