"""What reports say in words and tables."""

from __future__ import annotations

import dataclasses

import pytest

from gap_export.report import document_of
from gap_export.report.evaluation import p_value
from gap_export.report.markdown import to_markdown
from gap_export.report.panels import panels_of
from tests.report.made_up_checks import check_report, passing_report
from tests.report.made_up_evaluations import (
    evaluation_report,
    setting_row,
    unpruned_report,
    unusable,
    whole_row,
)
from tests.report.reading import rendered, table_of


def markdown_of(report=None, **changes):
    return to_markdown(document_of(report or evaluation_report(**changes)))


def test_check_says_what_is_wrong_and_leaves_out_layers_that_are_right():
    text = markdown_of(check_report())
    assert text.startswith("# gap-export check: FAILED\n")
    page = rendered(text)
    assert "first diverges at /layers.5/self_attn/the red circle" in page.text
    assert "IoU over 0.95: 94.0 %" in page.text
    assert page.text.count("no GPU on this machine") == 1
    assert "/layers.6/" in page.text
    assert "/layers.4/self_attn" not in page.text
    assert "# gap-export check: passed" in markdown_of(passing_report())


def test_evaluation_says_what_was_measured_and_how():
    line = rendered(markdown_of()).line
    for text in (
        "gap-export eval: refshapes-llava on refshapes",
        "Acc@0.5: unpruned 99.2 %; GAP 33.2-93.0 %; compact positions 0.4-2.2 %; ",
        "GAP recovers at least 33.5 % of unpruned.",
        "expressions: 500 about 63 images",
        "3 of the data set's 503 expressions. Counted as wrong: 2. Left out, since by their "
        "annotation no answer could be right: 1",
        "protocol: unpad: pixels of the original image, plain IoU, > 0.5",
        "prompt: USER: <image> the red circle {expression} ASSISTANT:",
        "seed: 0",
        "backend: ONNX Runtime 1.32.0 (CPUExecutionProvider)",
        "percentile bootstrap over images",
        "every id from the first visual token on, by 6",
    ):
        assert text in line


def test_evaluation_has_a_line_for_each_setting():
    header, rule, *rows = table_of(markdown_of(), "Acc@0.5 by the protocol unpad")
    assert set(rule[1:]) == {"---:"}
    assert len(rows) == 9
    assert dict(zip(header, rows[4], strict=True)) == {
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
        "images": "63",
        "not asked": "2",
        "Acc@0.5 without those": "93.4 %",
    }


def test_doubts_come_first():
    doubt = "out of scale: 57 of 60; <b>"
    page = rendered(markdown_of(warnings=(doubt,)))
    assert 0 < page.text.index(doubt) < page.text.index("model: ")


def test_settings_are_compared_in_pairs():
    rows = table_of(markdown_of(), "two settings over the same expressions, counted at Acc@0.5")
    assert rows[2] == [
        *("random keep 0.3 gap", "random keep 0.3 compact", "8", "457", "0", "35", "+91.4"),
        *("+88.6 to +93.6", "< 1e-300"),
    ]
    assert rows[3][-1] == "5.4e-138"


def test_the_least_there_can_be_has_no_empty_table():
    markdown = markdown_of(unpruned_report())
    assert [line for line in markdown.splitlines() if line.startswith("## ")] == ["## Accuracy"]
    assert "could not be asked: none of the data set's expressions" in rendered(markdown).text
    assert "recovers" not in markdown


def test_a_split_alone_is_not_said_twice():
    one = {"heldout": setting_row().by_split["heldout"]}
    rows = (whole_row(by_split=one), setting_row(by_split=one))
    assert "Accuracy by split" not in markdown_of(rows=rows)
    assert "Accuracy by split" in markdown_of()


def test_latency_names_the_backend_of_each_setting_where_they_differ():
    title = "milliseconds by stage: median / 95th percentile"
    rows = (whole_row(), setting_row(backend="TensorRT 10.3 (Orin)"))
    header, _, row, other = table_of(markdown_of(rows=rows), title)
    assert header == [
        *("setting", "backend", "expressions a batch"),
        *("vision_encoder", "prefill", "decode", "total"),
    ]
    assert row[1] == "ONNX Runtime 1.32.0 (CPUExecutionProvider)"
    assert other[1:3] == ["TensorRT 10.3 (Orin)", "7.9"]
    assert other[-1] == "61.2 / 70.1"
    assert "backend" not in table_of(markdown_of(), title)[0]


def test_expressions_that_cannot_be_asked_are_counted_by_reason_and_listed():
    many = tuple(unusable(text=str(number)) for number in range(60))
    data = dataclasses.replace(evaluation_report().data, unusable=(*many, unusable("empty box")))
    markdown = markdown_of(data=data)
    assert table_of(markdown, "expressions by reason")[2:] == [
        ["missing picture", "60", "counted as wrong"],
        ["empty box", "1", "left out"],
    ]
    listed = table_of(markdown, "each of them")
    assert ["17-3", "heldout", "missing picture", "images/3.jpg"] in listed
    assert "11 more are left out here." in markdown


def test_panels_hold_each_configuration_beside_the_unpruned_model():
    panels = panels_of(evaluation_report().rows)
    assert [(panel.title, [row.positions for row in panel.rows]) for panel in panels] == [
        ("random keep 0.3", ["none", "compact", "gap"]),
        ("spatial keep 0.3", ["none", "compact", "gap"]),
        ("spatial keep 0.1", ["none", "compact", "gap"]),
        ("no token dropped", ["none", "permuted", "shifted"]),
    ]
    assert [panel.title for panel in panels_of(unpruned_report().rows)] == ["unpruned"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "1.000"), (0.0104, "0.010"), (9.9e-4, "9.9e-04"), (0.0, "< 1e-300")],
)
def test_p_value_keeps_what_can_be_read_of_it(value, shown):
    assert p_value(value) == shown
