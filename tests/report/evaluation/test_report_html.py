"""The page: plots and pictures in it, nothing outside of it, and nobody else's markup."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2", reason="the extra `report` is not installed")
pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from gap_export.evaluation.questions import PictureSource
from gap_export.report.evaluation import write_reports
from gap_export.report.evaluation.gallery import gallery_shelves
from gap_export.report.evaluation.plots import (
    draw_accuracies,
    draw_groups,
    draw_latencies,
    draw_thresholds,
    draw_tokens,
)
from gap_export.report.evaluation.words import by_kind, panels
from gap_export.visible import clean
from tests.parity.reports import HOSTILE
from tests.report.evaluation.made_up import (
    accuracy,
    evaluation_report,
    gallery_item,
    setting_row,
    unpruned_report,
    whole_row,
)
from tests.report.parity.test_report import Page

SVG = "{http://www.w3.org/2000/svg}"
INK, BLUE, VERMILLION = "#222222", "#0072B2", "#D55E00"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three pages: one of all there can be, one full of hostile text, one of the least."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = evaluation_report(HOSTILE)
    reports = {
        "full": evaluation_report(),
        "hostile": dataclasses.replace(hostile, rows=(*hostile.rows[:3], hostile.rows[-1])),
        "least": unpruned_report(),
    }
    for name, report in reports.items():
        write_reports(report, html_path=folder / f"{name}.html")
    return {name: (folder / f"{name}.html").read_text(encoding="utf-8") for name in reports}


@pytest.mark.parametrize("name", ["full", "hostile", "least"])
def test_page_needs_nothing_but_itself(sources, name):
    source = sources[name]
    page = Page(source)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for key, value in page.attributes:
        assert not key.startswith("on")
        assert key not in {"src", "srcset", "action", "data"}
        assert key not in {"href", "xlink:href"} or value.startswith(("#", "data:image/"))
    assert "@import" not in source
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", source))
    # Browsers are told so as well.
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in source


@pytest.mark.parametrize(("count", "width"), [(1, 552), (2, 864), (3, 1104)])
def test_panels_are_not_blown_up(count, width):
    found = panels(evaluation_report().rows)[:count]
    assert len(found) == count
    svg = draw_thresholds(found, mark="m")
    assert f'style="max-width:{width}px;min-width:' in svg


@pytest.mark.parametrize("name", ["full", "hostile", "least"])
def test_what_does_not_fit_is_scrolled_to(sources, name):
    source = sources[name]
    assert source.count("<table>") == source.count('<div class="scroll" tabindex="0"><table>') > 0
    assert source.count("px;min-width:") == source.count('<div class="scroll" tabindex="0"><svg ')
    # Titles of tables stay in sight, and at the edge of a plot one sees that it goes on.
    assert source.count("<caption><span>") == source.count("<table>")
    assert 'style="fill: #ffffff"/>' not in source


def test_page_escapes_all_that_others_wrote(sources):
    source = sources["hostile"]
    plain, hostile = Page(sources["full"]), Page(source)
    assert hostile.tags == plain.tags
    shown = " ".join(hostile.text.split())
    assert " ".join(clean(HOSTILE).split()) in shown
    assert "{{ 7*7 }}" in shown
    assert "<script" not in source
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", source)


def test_page_says_what_was_measured_and_how(sources):
    text = " ".join(Page(sources["full"]).text.split())
    for told in (
        "gap-export eval: refshapes-llava on refshapes",
        "GAP recovers at least 33.5 % of unpruned.",
        "unpad: pixels of the original picture, plain IoU, > 0.5",
        "USER: <image> the red circle {expression} ASSISTANT:",
        "Counted as wrong: 2.",
        "Acc@0.5 of the same answers by other protocols",
        "5.4e-138",
        "right with GAP, wrong with compact positions",
        "no such image: /no/the red circle.jpg",
        "spatial keep 0.3 gap: IoU 0.84",
    ):
        assert told in text


def test_tables_and_pictures_have_names_for_those_who_cannot_see_them(sources):
    source = sources["full"]
    assert source.count("<caption>") == source.count("<table>") > 8
    assert all(name in source for name in ('<th scope="col">', '<th scope="row"'))
    pictures = re.findall(r'<svg[^>]*role="img"[^>]*>', source)
    captions = re.findall(r'<figcaption id="([^"]*)"', source)
    named = [re.search(r'aria-labelledby="([^"]*)"', tag) for tag in pictures]
    assert [found[1] for found in named if found] == captions
    described = [re.search(r'aria-label="([^"]+)"', tag) for tag in pictures]
    assert all(bool(one) != bool(other) for one, other in zip(named, described, strict=True))
    assert any(one and "random keep 0.3 gap: IoU 0.56" in one[1] for one in described)


def test_page_has_a_plot_for_each_question(sources):
    marks = re.findall(r'<figcaption id="([^"]*)-caption"', sources["full"])
    assert marks == ["accuracies", "tokens", "thresholds", "kinds", "splits", "latency"]
    assert re.findall(r'<figcaption id="([^"]*)-caption"', sources["least"]) == ["accuracies"]


def test_pictures_on_one_page_share_no_ids(sources):
    ids = re.findall(r'\bid="([^"]*)"', sources["full"])
    assert len(ids) > 50
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', sources["full"])) <= set(ids)


def test_the_same_report_gives_the_same_page(tmp_path):
    small = dataclasses.replace(unpruned_report(), gallery=(gallery_item(),))
    for name in ("one.html", "other.html"):
        write_reports(small, html_path=tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "other.html").read_bytes()


def test_a_long_table_is_cut_and_says_so(tmp_path):
    data = evaluation_report().data
    many = dataclasses.replace(data, unusable=data.unusable * 200)
    report = dataclasses.replace(unpruned_report(), data=many)
    write_reports(report, html_path=tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert text.count("images/other.jpg") == 167
    assert "100 more are in the JSON form of this report." in text


def marks_of(svg, color):
    """Markers and lines of a colour."""
    styles = [element.get("style", "") for element in ET.fromstring(svg).iter()]
    return sum(color.lower() in style for style in styles)


def test_accuracies_have_a_mark_for_each_setting():
    one = (whole_row(), setting_row())
    more = (*one, setting_row(name="other keep 0.3 gap"))
    assert marks_of(draw_accuracies(more, mark="m"), BLUE) > marks_of(
        draw_accuracies(one, mark="m"), BLUE
    )
    assert marks_of(draw_accuracies(one, mark="m"), VERMILLION) == 0


def test_higher_accuracy_is_drawn_further_right():
    rows = [setting_row(share, ci95=(share, share)) for share in (0.1, 0.5, 0.9)]
    uses = ET.fromstring(draw_accuracies(rows, mark="m")).iter(f"{SVG}use")
    places = [float(use.get("x")) for use in uses if BLUE.lower() in use.get("style", "")]
    # The legend is drawn last.
    low, middle, high = tuple(dict.fromkeys(places))[:3]
    assert high - middle == pytest.approx(middle - low, rel=1e-3)


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


def test_plots_are_drawn_of_any_numbers_and_names():
    rows = (whole_row(), *(setting_row(**changes) for changes in EXTREMES))
    groups = panels(rows)
    for svg in (
        draw_accuracies(rows, mark="m"),
        draw_thresholds(groups, mark="m"),
        draw_groups(groups, by_kind, mark="m"),
        draw_tokens(rows, mark="m"),
        draw_latencies(rows, mark="m"),
    ):
        assert ET.fromstring(svg).tag == f"{SVG}svg"
        assert "nan" not in re.sub(r"<(text|title).*?</\1>", "", svg).lower()


def card_of(item, **changes):
    (shelf,) = gallery_shelves(evaluation_report(gallery=(item,), **changes))
    (card,) = shelf.cards
    return shelf, card


def pixels_of(card):
    _, encoded = card.uri.split(";base64,")
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_gallery_draws_the_right_box_then_those_of_the_first_pruner():
    shelf, card = card_of(gallery_item())
    truth, compact, gap = card.rectangles
    assert (truth.x, truth.y, truth.width, truth.height) == (20.0, 30.0, 30.0, 32.5)
    assert (truth.color, compact.color, gap.color) == (INK, VERMILLION, BLUE)
    assert (gap.x, gap.width) == (25.0, 22.0)
    assert compact.dashes and not gap.dashes
    assert truth.line > gap.line
    assert [stroke.label for stroke in shelf.strokes] == ["right box", "compact positions", "GAP"]
    told = [(answer.setting, answer.iou, answer.stroke is not None) for answer in card.answers]
    assert told == [
        ("random keep 0.3 compact", "IoU 0.10", True),
        ("random keep 0.3 gap", "IoU 0.56", True),
        ("unpruned", "IoU 0.97", False),
        ("spatial keep 0.3 compact", "no box", False),
        ("spatial keep 0.3 gap", "IoU 0.84", False),
    ]


def test_gallery_keeps_boxes_within_the_picture_and_leaves_out_what_is_none():
    item = gallery_item()
    nan, inf = float("nan"), float("inf")
    strange = [(-1e9, 10.0, 1e9, 20.0), (nan, 0.0, 1.0, inf), (9.0, 9.0, 3.0, 4.0)]
    answers = [
        dataclasses.replace(item.answers[index], box=box)
        for index, box in zip((3, 4, 0), strange, strict=True)
    ]
    _, card = card_of(dataclasses.replace(item, answers=tuple(answers)))
    _, compact = card.rectangles
    assert -card.margin < compact.x
    assert compact.x + compact.width < card.width + card.margin
    _, reversed_corners = card_of(
        dataclasses.replace(item, answers=(answers[2],)), rows=(whole_row(),)
    )
    drawn = reversed_corners.rectangles[1]
    assert (drawn.x, drawn.y, drawn.width, drawn.height) == (3.0, 4.0, 6.0, 5.0)


@pytest.mark.parametrize("size", [(40, 30), (3000, 20), (900, 1300)])
def test_gallery_pictures_are_of_bounded_size(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    source = PictureSource(path=tmp_path / "noise.png")
    _, card = card_of(gallery_item(picture=source))
    assert (card.width, card.height) == size
    assert max(pixels_of(card).size) <= 400
    # Nothing is larger than noise.
    assert len(card.uri) < 300_000


def test_gallery_shows_small_pictures_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    _, card = card_of(gallery_item(picture=PictureSource(path=tmp_path / "small.png")))
    assert np.array_equal(np.asarray(pixels_of(card)), pixels)


def test_gallery_is_in_order_and_not_without_end():
    items = [
        gallery_item(kind=kind, question_id=f"{kind} {number}")
        for number in range(25)
        for kind in ("best", "worst", "flipped by GAP")
    ]
    shelves = gallery_shelves(evaluation_report(gallery=tuple(items)))
    assert [shelf.title.split()[0] for shelf in shelves] == ["right", "where", "where"]
    assert [len(shelf.cards) for shelf in shelves] == [25, 25, 10]
    assert shelves[1].cards[3].question == "best 3"


def test_a_picture_that_cannot_be_loaded_any_more_leaves_its_answers(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    _, card = card_of(gallery_item(picture=PictureSource(path=tmp_path / "text.jpg")))
    assert (card.uri, len(card.answers)) == ("", 5)
    assert "not an image" in card.problem
