"""The page of both kinds of report: all it needs is in it, and no markup of anyone else."""

from __future__ import annotations

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2", reason="the extra `report` is not installed")
pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from gap_export.evaluation.questions import ImageSource
from gap_export.report import document_of
from gap_export.report.figures import BLUE, INK, VERMILLION
from gap_export.report.gallery import gallery_shelves
from gap_export.report.html import to_html
from gap_export.visible import clean
from tests.report.made_up_checks import HOSTILE, check_report, passing_report
from tests.report.made_up_evaluations import (
    evaluation_report,
    gallery_item,
    unpruned_report,
    whole_row,
)
from tests.report.reading import Page


def page_of(report):
    return to_html(document_of(report))


@pytest.fixture(scope="module")
def sources():
    """Pages of each kind: all there can be, full of hostile text, and the least."""
    hostile = evaluation_report(HOSTILE)
    reports = {
        "check": check_report(),
        "check hostile": check_report(HOSTILE),
        "check least": passing_report(),
        "eval": evaluation_report(),
        "eval hostile": dataclasses.replace(hostile, rows=(*hostile.rows[:3], hostile.rows[-1])),
        "eval least": unpruned_report(),
    }
    return {name: page_of(report) for name, report in reports.items()}


def test_page_needs_nothing_but_itself(sources):
    for source in sources.values():
        page = Page(source)
        assert not page.tags & set("script link img iframe object embed base form".split())
        for key, value in page.attributes:
            assert not key.startswith("on")
            assert key not in {"src", "srcset", "action", "data"}
            assert key not in {"href", "xlink:href"} or value.startswith(("#", "data:image/"))
        assert "@import" not in source
        assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", source))
        # The browser is told the same.
        assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in source


def test_what_does_not_fit_is_scrolled_to_in_its_own_container(sources):
    for source in sources.values():
        tables = re.findall(r'<div class="scroll" role="region" [^>]*tabindex="0"><table>', source)
        assert source.count("<table>") == len(tables) > 0
        plots = source.count('<div class="scroll" tabindex="0"><svg ')
        assert source.count("px;min-width:") == plots
        # At the edge of a plot one sees that it goes on.
        assert 'style="fill: #ffffff"/>' not in source


def test_page_is_for_light_and_dark_narrow_screens_and_paper(sources):
    for rule in ("prefers-color-scheme: dark", "max-width: 600px", "@media print"):
        assert rule in sources["eval"]
    # A figure has the page's colors, and its own where it stands alone.
    assert "var(--blue, #0072b2)" in sources["eval"]
    for scheme in re.findall(r":root \{[^}]*--page[^}]*--ink[^}]*\}", sources["eval"]):
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", scheme))
        assert contrast(colors["ink"], colors["surface"]) > 7
        for text, back in (
            ("soft", "page"), ("soft", "raised"), ("good", "good-back"), ("bad", "bad-back"),
            ("quiet", "quiet-back"), ("good", "surface"),
        ):  # fmt: skip
            assert contrast(colors[text], colors[back]) >= 4.5, (text, back)


def contrast(one, other):
    """Contrast ratio of WCAG 2.2."""

    def luminance(color):
        channels = np.array([int(color[n : n + 2], 16) for n in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ (0.2126, 0.7152, 0.0722) + 0.05

    return max(luminance(one), luminance(other)) / min(luminance(one), luminance(other))


@pytest.mark.parametrize("kind", ["check", "eval"])
def test_page_escapes_all_text_of_users_and_models(sources, kind):
    source = sources[f"{kind} hostile"]
    plain, hostile = Page(sources[kind]), Page(source)
    assert hostile.tags == plain.tags
    assert " ".join(clean(HOSTILE).split()) in hostile.line
    assert "{{ 7*7 }}" in hostile.line
    assert "<script" not in source
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", source)


def test_check_shows_the_verdict_the_divergence_and_what_differs(sources):
    text = Page(sources["check"]).line
    for shown in (
        "gap-export check: FAILED",
        "which MatMul node_MatMul_17 of module layers.5.self_attn.q_proj gives",
        "off by 1.0e-03, allowed 1.0e-04",
        "decoder_model_merged, layer by layer",
        "635 to 635 232 to 232",
        "TensorRT not run",
        "tolerance of keep_indices: indices are exact",
    ):
        assert shown in text
    # Five levels were not run for one reason, which is said once.
    assert text.count("no GPU on this machine") == 1
    assert "gap-export check: passed" in Page(sources["check least"]).line


def test_evaluation_shows_what_was_measured_and_how(sources):
    text = Page(sources["eval"]).line
    for shown in (
        "gap-export eval: refshapes-llava on refshapes",
        "GAP recovers at least 33.5 % of unpruned",
        "unpad: pixels of the original image, plain IoU, > 0.5",
        "USER: <image> the red circle {expression} ASSISTANT:",
        "Counted as wrong: 2.",
        "Acc@0.5 of the same answers by other protocols",
        "5.4e-138",
        "right with GAP, wrong with compact positions",
        "no such image: /no/the red circle.jpg",
        "spatial keep 0.3 gap: IoU 0.84",
    ):
        assert shown in text


def test_tables_figures_and_images_have_names_for_those_who_cannot_see_them(sources):
    for source in sources.values():
        ids = re.findall(r'\bid="([^"]*)"', source)
        assert len(ids) == len(set(ids))
        used = re.findall(r'(?:href="#|aria-labelledby=")([^"]*)"', source)
        assert set(used) <= set(ids)
        assert all(name in source for name in ('<th scope="col"', '<th scope="row"'))
        for tag in re.findall(r'<svg[^>]*role="img"[^>]*>', source):
            assert ("aria-labelledby=" in tag) != ("aria-label=" in tag)
    described = re.findall(r'aria-label="([^"]+)"', sources["eval"])
    assert any("random keep 0.3 gap: IoU 0.56" in text for text in described)


def test_page_has_a_plot_for_each_question(sources):
    count = {name: source.count('-caption">') for name, source in sources.items()}
    assert (count["eval"], count["eval least"], count["check"]) == (6, 1, 2)


def test_the_same_report_gives_the_same_page(sources):
    assert page_of(check_report()) == sources["check"]


def test_a_long_table_is_cut_and_says_so():
    data = evaluation_report().data
    many = dataclasses.replace(data, unusable=data.unusable * 200)
    text = Page(page_of(dataclasses.replace(unpruned_report(), data=many))).text
    assert text.count("images/other.jpg") == 167
    assert "100 more are in the JSON form of this report." in text


def card_of(item, **changes):
    (shelf,) = gallery_shelves(evaluation_report(gallery=(item,), **changes))
    (card,) = shelf.cards
    return shelf, card


def pixels_of(card):
    _, encoded = card.uri.split(";base64,")
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_gallery_draws_the_right_box_then_those_of_the_first_pruner():
    shelf, card = card_of(gallery_item())
    (truth, right), (compact, _), (gap, answered) = card.boxes
    # The longer side of an image, 96 pixels here, is drawn as 400.
    assert card.size == (400, 400)
    assert right == pytest.approx([edge * 400 / 96 for edge in (20.0, 30.0, 30.0, 32.5)], abs=0.01)
    assert answered[0::2] == pytest.approx([25 * 400 / 96, 22 * 400 / 96], abs=0.01)
    assert (truth.color, compact.color, gap.color) == (INK, VERMILLION, BLUE)
    assert compact.dashes and not gap.dashes
    assert truth.width > gap.width
    assert [stroke.label for stroke in shelf.strokes] == ["right box", "compact positions", "GAP"]
    assert [(one.setting, one.iou, one.stroke is not None) for one in card.answers] == [
        ("random keep 0.3 compact", "IoU 0.10", True),
        ("random keep 0.3 gap", "IoU 0.56", True),
        ("unpruned", "IoU 0.97", False),
        ("spatial keep 0.3 compact", "no box", False),
        ("spatial keep 0.3 gap", "IoU 0.84", False),
    ]


def test_gallery_keeps_boxes_within_the_image_and_leaves_out_what_is_none():
    item = gallery_item()
    nan, inf = float("nan"), float("inf")
    strange = [(-1e9, 10.0, 1e9, 20.0), (nan, 0.0, 1.0, inf), (9.0, 9.0, 3.0, 4.0)]
    answers = [
        dataclasses.replace(item.answers[index], box=box)
        for index, box in zip((3, 4, 0), strange, strict=True)
    ]
    _, card = card_of(dataclasses.replace(item, answers=tuple(answers)))
    _, (_, (left, _, width, _)) = card.boxes
    assert left > -8 and left + width < card.size[0] + 8
    one = dataclasses.replace(item, answers=(answers[2],))
    _, reversed_corners = card_of(one, rows=(whole_row(),))
    _, drawn = reversed_corners.boxes[1]
    assert drawn == pytest.approx([edge * 400 / 96 for edge in (3, 4, 6, 5)], abs=0.01)


@pytest.mark.parametrize("size", [(40, 30), (3000, 20), (900, 1300)])
def test_gallery_images_are_of_bounded_size_and_small_ones_are_exact(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    _, card = card_of(gallery_item(image=ImageSource(path=tmp_path / "noise.png")))
    assert max(card.size) == 400
    assert card.size[0] / card.size[1] == pytest.approx(size[0] / size[1], rel=0.01)
    assert max(pixels_of(card).size) <= 400
    # Nothing is larger than noise.
    assert len(card.uri) < 300_000
    if size == (40, 30):
        assert np.array_equal(np.asarray(pixels_of(card)), noise)


def test_gallery_is_in_order_and_bounded():
    items = [
        gallery_item(kind=kind, question_id=f"{kind} {number}")
        for number in range(25)
        for kind in ("best", "worst", "flipped by GAP")
    ]
    shelves = gallery_shelves(evaluation_report(gallery=tuple(items)))
    assert [shelf.title.split()[0] for shelf in shelves] == ["right", "where", "where"]
    assert [len(shelf.cards) for shelf in shelves] == [25, 25, 10]
    assert shelves[1].cards[3].question == "best 3"


def test_an_image_that_cannot_be_loaded_any_more_leaves_its_answers(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    _, card = card_of(gallery_item(image=ImageSource(path=tmp_path / "text.jpg")))
    assert (card.uri, len(card.answers)) == ("", 5)
    assert "not an image" in card.problem
