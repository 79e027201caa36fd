"""Figures are drawn of any numbers and names, with a mark for each of them."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from gap_export.report.figures import BLUE, VERMILLION
from gap_export.report.figures.accuracies import (
    draw_accuracies,
    draw_groups,
    draw_latencies,
    draw_thresholds,
    draw_tokens,
)
from gap_export.report.figures.errors import draw_errors
from gap_export.report.panels import panels_of
from tests.report.made_up_checks import tensor_row
from tests.report.made_up_evaluations import accuracy, evaluation_report, setting_row, whole_row

SVG = "{http://www.w3.org/2000/svg}"


def marks_of(svg, color):
    """Marks of a color, those of the legend included."""
    uses = ET.fromstring(svg).iter(f"{SVG}use")
    return [use for use in uses if color.lower() in use.get("style", "")]


def check_drawn(svg):
    assert ET.fromstring(svg).tag == f"{SVG}svg"
    assert "nan" not in re.sub(r"<(text|title).*?</\1>", "", svg).lower()


def test_errors_have_a_mark_for_each_tensor_and_verdict():
    rows = [tensor_row(max_abs_diff=10.0**-n, passed=n > 4) for n in range(2, 9)]
    svg = draw_errors(rows, "m")
    # One more of each is in the legend.
    assert len(marks_of(svg, BLUE)) == 4 + 1
    assert len(marks_of(svg, VERMILLION)) == 3 + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"max_abs_diff": float("inf"), "mean_abs_diff": float("nan"), "p99_abs_diff": float("inf")},
        {"max_abs_diff": 0.0, "mean_abs_diff": 0.0, "p99_abs_diff": 0.0, "atol": 0.0, "rtol": 0.0},
        {"max_abs_diff": 5e-324, "atol": 0.0},
        {"max_abs_diff": 1.7e308, "mean_abs_diff": 1e-300},
        {"atol": float("inf")},
        {"tensor": "$\\frac{1}$ \U0001f600 \n\x00"},
        {"tensor": "x" * 10_000},
    ],
    ids=["inf", "zero", "subnormal", "huge", "no tolerance", "formula", "long name"],
)
def test_errors_are_drawn_of_any_numbers_and_names(changes):
    check_drawn(draw_errors([tensor_row(**changes)], "m"))


EXTREMES = [
    {"acc_at_50": 0.0, "ci95": (0.0, 0.0)},
    # A bootstrap's interval may leave out the value.
    {"acc_at_50": 0.5, "ci95": (0.6, 0.7)},
    {"name": "$\\frac{1}$ \U0001f600 \n\x00", "pruner": "$x$"},
    {"name": "x" * 10_000, "pruner": "y" * 10_000},
    {"by_kind": {f"$kind_{n}$ {'z' * 60}": accuracy(0.5) for n in range(40)}},
    {"curve": {}, "latency_ms": {}, "by_kind": {}},
    {"latency_ms": {f"stage {n}": {"median": 0.0, "p95": 0.0} for n in range(20)}},
    {"mean_visual_tokens": 0.0},
]


def test_accuracies_are_drawn_of_any_numbers_and_names():
    rows = (whole_row(), *(setting_row(**changes) for changes in EXTREMES))
    panels = panels_of(rows)
    for svg in (
        draw_accuracies(rows, "m"),
        draw_thresholds(panels, "m"),
        draw_groups(panels, lambda row: row.by_kind, "m"),
        draw_tokens(rows, "m"),
        draw_latencies(rows, "m"),
    ):
        check_drawn(svg)


def test_accuracies_have_a_mark_for_each_setting():
    one = (whole_row(), setting_row())
    more = (*one, setting_row(name="other keep 0.3 gap"))
    assert len(marks_of(draw_accuracies(more, "m"), BLUE)) > len(
        marks_of(draw_accuracies(one, "m"), BLUE)
    )
    assert marks_of(draw_accuracies(one, "m"), VERMILLION) == []


def test_higher_accuracy_is_drawn_further_right():
    rows = [setting_row(share, ci95=(share, share)) for share in (0.1, 0.5, 0.9)]
    places = [float(use.get("x")) for use in marks_of(draw_accuracies(rows, "m"), BLUE)]
    # The legend is drawn last.
    low, middle, high = tuple(dict.fromkeys(places))[:3]
    assert high - middle == pytest.approx(middle - low, rel=1e-3)


@pytest.mark.parametrize(("count", "width"), [(1, 480), (2, 768), (3, 960)])
def test_panels_are_not_blown_up(count, width):
    found = panels_of(evaluation_report().rows)[:count]
    assert len(found) == count
    svg = draw_thresholds(found, "m")
    assert f'style="max-width:{width}px;min-width:' in svg
    assert 'aria-labelledby="m-caption"' in svg
