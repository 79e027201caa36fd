"""The page: everything in it, nothing outside of it, and nobody else's markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("jinja2", reason="the extra `report` is not installed")
pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from gap_export.report.parity import write_reports
from gap_export.report.parity.plots import draw_errors
from gap_export.visible import clean
from tests.parity.reports import HOSTILE, check_report, passing_report, tensor_row
from tests.report.parity.test_report import Page

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three pages: one that failed, one full of hostile text, one that passed."""
    folder = tmp_path_factory.mktemp("pages")
    reports = {
        "failed": check_report(),
        "hostile": check_report(HOSTILE),
        "passed": passing_report(),
    }
    for name, report in reports.items():
        write_reports(report, html=folder / f"{name}.html")
    return {name: (folder / f"{name}.html").read_text(encoding="utf-8") for name in reports}


@pytest.mark.parametrize("name", ["failed", "hostile", "passed"])
def test_page_needs_nothing_but_itself(sources, name):
    source = sources[name]
    page = Page(source)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for key, value in page.attributes:
        assert not key.startswith("on")
        assert key not in {"src", "srcset", "action", "data"}
        assert key not in {"href", "xlink:href"} or value.startswith("#")
    assert "@import" not in source
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", source))
    # Browsers are told so as well.
    assert "default-src 'none'" in source


@pytest.mark.parametrize("name", ["failed", "hostile", "passed"])
def test_what_does_not_fit_is_scrolled_to(sources, name):
    source = sources[name]
    assert source.count("<table>") == source.count('<div class="scroll" tabindex="0"><table>') > 0
    plots = source.count("<svg ")
    assert plots == source.count('<div class="scroll" tabindex="0"><svg ')
    # 11.5 inches, and legible letters on a phone.
    assert source.count('style="max-width:1104px;min-width:684px"') == plots
    assert ".scroll {" in source


def test_page_escapes_all_that_others_wrote(sources):
    source = sources["hostile"]
    plain, hostile = Page(sources["failed"]), Page(source)
    assert hostile.tags == plain.tags
    shown = " ".join(hostile.text.split())
    assert " ".join(clean(HOSTILE).split()) in shown
    assert "{{ 7*7 }}" in shown
    assert "<script" not in source
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", source)


def test_page_shows_the_verdict_the_divergence_and_what_differs(sources):
    text = " ".join(Page(sources["failed"]).text.split())
    assert text.startswith("gap-export check: FAILED")
    assert "which MatMul node_MatMul_17 of module layers.5.self_attn.q_proj gives" in text
    assert "off by 1.0e-03, allowed 1.0e-04" in text
    assert "decoder_model_merged, layer by layer" in text
    assert "635 to 635 232 to 232" in text or "635 to 635232 to 232" in text
    # Five levels were not run for one reason, which is said once.
    assert "TensorRT" in text
    assert text.count("no GPU on this machine") == 1
    assert "tolerance of keep_indices: indices are exact" in text
    assert "gap-export check: passed" in Page(sources["passed"]).text


def drawing(rows, mark="m"):
    return ET.fromstring(draw_errors(rows, mark=mark))


def test_a_picture_has_a_mark_for_each_tensor_and_verdict():
    rows = [tensor_row(max_abs_diff=10.0**-n, passed=n > 4) for n in range(2, 9)]
    both = drawing(rows)
    colors = [element.get("style", "") for element in both.iter(f"{SVG}use")]
    # One more of each is in the legend.
    assert sum("#0072b2" in color for color in colors) == 4 + 1
    assert sum("#d55e00" in color for color in colors) == 3 + 1
    assert both.get("role") == "img"


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
def test_a_picture_is_drawn_of_any_numbers_and_names(changes):
    svg = draw_errors([tensor_row(**changes)], mark="m")
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert "nan" not in re.sub(r"<(text|title).*?</\1>", "", svg).lower()


def test_pictures_on_one_page_share_no_ids(sources):
    ids = re.findall(r'\bid="([^"]*)"', sources["failed"])
    assert len(ids) > 20
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]*)"', sources["failed"]))
    assert used <= set(ids)


def test_the_same_report_gives_the_same_page(sources, tmp_path):
    write_reports(check_report(), html=tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == sources["failed"]
