"""The page, used in Chromium as somebody uses it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.evaluation.refshapes import Scene, generate_scene
from gap_export.runtime.session import GroundingSession
from tests.serving.conftest import Served, running

pytestmark = pytest.mark.full
sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `full` is not installed")

CHROMIUM = Path("/usr/bin/chromium")
KEY = "a key of the page's test"
NUM_CAMERA_SCENES = 6
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
Open = Callable[..., Any]


def scene_of(index: int) -> Scene:
    return generate_scene(split="heldout", seed=0, index=index, num_expressions=4)


def encoded(image: np.ndarray, kind: str, side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def site(demo_bundle: Path) -> Iterator[Served]:
    with running(demo_bundle) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    frames = tmp_path_factory.mktemp("camera") / "scenes.mjpeg"
    scenes = [encoded(scene_of(index).image, "jpeg", 480) for index in range(NUM_CAMERA_SCENES)]
    frames.write_bytes(b"".join(one * 12 for one in scenes))
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-video-capture={frames}",
            ],
        )
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, site: Served) -> Iterator[Open]:
    """Opens a page, of which no error and no request to another host is expected."""
    wrong: list[str] = []
    contexts = []

    def opened(served: Served = site, *, scheme: str = "light", size: Any = WIDE) -> Any:
        context = browser.new_context(
            color_scheme=scheme,
            viewport=size,
            # Places are measured when nothing moves any more.
            reduced_motion="reduce",
        )
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()

        def hear(message: Any) -> None:
            # Chromium says this of every answer that is an error.
            if message.type == "error" and not message.text.startswith("Failed to load resource"):
                wrong.append(message.text)

        page.on("console", hear)
        page.on("pageerror", lambda err: wrong.append(str(err)))
        page.on(
            "request",
            lambda one: one.url.startswith((served.url, "data:")) or wrong.append(one.url),
        )
        page.goto(served.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def drop(page: Any, data: bytes, name: str, kind: str) -> None:
    """Drop a file in the middle of the page."""
    transfer = page.evaluate_handle(
        """([data, name, type]) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})


def show_example(page: Any) -> None:
    page.get_by_role("button", name="Show an example").click()
    page.locator("#timings").wait_for()


def boxes_shown(page: Any, pane: str, image_size: tuple[int, int]) -> list[list[float]]:
    """Boxes as they lie on the screen, in pixels of the image."""
    placed = page.evaluate(
        """(id) => {
            const frame = document.querySelector(`#${id} .boxes`).getBoundingClientRect();
            return [...document.querySelectorAll(`#${id} .box:not(.true)`)].map((one) => {
                const { left, top, right, bottom } = one.getBoundingClientRect();
                return [
                    (left - frame.left) / frame.width, (top - frame.top) / frame.height,
                    (right - frame.left) / frame.width, (bottom - frame.top) / frame.height,
                ];
            });
        }""",
        pane,
    )
    return (np.array(placed) * [*image_size, *image_size]).tolist()


@pytest.mark.parametrize("positions", ["gap", "compact"])
def test_a_dropped_image_gets_the_boxes_of_the_session(open_page, demo_bundle, positions):
    scene, page = scene_of(1), open_page()
    image = encoded(scene.image, "png", 288)
    words = [one.text for one in scene.expressions]
    drop(page, image, "scene.png", "image/png")
    page.get_by_role("status").get_by_text("Now type what to look for.").wait_for()
    page.get_by_label("What to look for").fill("\n".join(["", *words, " "]))
    page.get_by_label("What to look for").press("Control+Enter")
    page.locator("#timings").wait_for()
    with (
        GroundingSession.open(demo_bundle, positions=positions) as session,
        Image.open(io.BytesIO(image)) as opened,
    ):
        answers = session.ground_batch(opened, words)
    assert page.locator(".pick .words").all_inner_texts() == words
    for shown, one in zip(boxes_shown(page, positions, (288, 288)), answers, strict=True):
        # Chromium places boxes to a 64th of a pixel.
        assert shown == pytest.approx(one.box, abs=0.2)
    cells = page.locator(".answer", has_text="GAP" if positions == "gap" else "Compact")
    for text, one in zip(cells.all_inner_texts(), answers, strict=True):
        (score,) = re.findall(r"score\s([\d.]+)", text)
        # Two digits are shown.
        assert float(score) == pytest.approx(one.score, rel=0.06)
    pruned = page.locator(f"#{positions} path").get_attribute("d").count("M")
    assert pruned == answers[0].num_visual_tokens - len(answers[0].keep_indices)


def test_what_was_pruned_is_dark_and_what_was_kept_is_not(open_page, demo_bundle):
    page = open_page()
    show_example(page)
    with GroundingSession.open(demo_bundle) as session:
        (grid,) = session.ground(scene_of(0).image, "the big purple star").tokens
    is_dark = page.evaluate(
        """([rows, cols]) => {
            const path = document.querySelector("#gap path");
            const { width, height } = path.ownerSVGElement.viewBox.baseVal;
            return Array.from({ length: rows * cols }, (_, at) => {
                const [row, col] = [Math.floor(at / cols), at % cols];
                return path.isPointInFill(
                    new DOMPoint((col + 0.5) * width / cols, (row + 0.5) * height / rows));
            });
        }""",
        [grid.rows, grid.cols],
    )
    assert [at for at, dark in enumerate(is_dark) if not dark] == list(grid.kept)
    page.get_by_label("Show the kept tokens").uncheck()
    assert page.locator("svg path").count() == 0
    assert not page.locator("#legend-tokens").is_visible()


def test_gap_meets_the_true_boxes_of_examples_where_compact_misses(open_page):
    page = open_page()
    overlaps: dict[str, list[float]] = {"GAP": [], "Compact": []}
    for index in range(4):
        show_example(page)
        page.locator("#source", has_text=f"example {index + 1}").wait_for()
        words = [one.text for one in scene_of(index).expressions]
        page.locator(".pick .words", has_text=re.compile(f"^{words[-1]}$")).wait_for()
        for name, found in overlaps.items():
            texts = page.locator(".answer", has_text=name).all_inner_texts()
            found += [float(text.split("IoU")[1]) for text in texts if "IoU" in text]
    assert np.mean(overlaps["GAP"]) > 0.5
    assert np.mean(overlaps["Compact"]) < 0.2
    assert page.locator(".box.true").count() == 2 * len(words)


def test_without_comparing_there_is_one_image_and_one_request(open_page):
    page = open_page()
    page.get_by_label("Compare").uncheck()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    show_example(page)
    assert not page.locator("#compact").is_visible()
    assert sum(url.endswith("/v1/ground") for url in asked) == 1
    page.get_by_label("Compare").check()
    page.locator(".answer", has_text="Compact").first.wait_for()
    assert page.locator("#compact .box").count() > 0


def test_the_camera_shows_each_frame_with_its_own_boxes(open_page):
    page = open_page()
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_label("What to look for").fill("the left-most object\nthe right-most object")
    page.locator("#timings").wait_for()
    seen = set()
    for _ in range(30):
        page.wait_for_timeout(150)
        canvases = page.evaluate(
            "() => [...document.querySelectorAll('canvas')].map((one) => one.toDataURL())"
        )
        # Both are of one frame.
        assert canvases[0] == canvases[1]
        seen.add(canvases[0])
    assert len(seen) >= NUM_CAMERA_SCENES / 2
    assert "frames a second. 2 of 2 have a box." in page.locator("#status").inner_text()
    assert page.locator("#status").get_attribute("aria-live") == "off"
    page.get_by_role("button", name="Stop the camera").click()
    page.get_by_role("button", name="Use the camera").wait_for()
    page.wait_for_timeout(500)
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.wait_for_timeout(500)
    assert not asked
    # The last frame can be asked something else.
    page.get_by_label("What to look for").fill("the object")
    page.get_by_role("button", name="Find").click()
    page.locator(".pick .words", has_text=re.compile("^the object$")).wait_for()
    assert len(asked) == 2


def test_all_of_it_can_be_done_with_the_keyboard(open_page):
    page = open_page()
    order = []
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(page.evaluate("() => document.activeElement.id"))
        # What has the focus shows it.
        width = page.evaluate(
            """() => getComputedStyle(document.activeElement.closest(".drop")
                ?? document.activeElement).outlineWidth"""
        )
        assert width == "3px"
    assert order == ["file", "camera", "example", "expressions", "compare", "tokens", "ask"]
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.locator("#timings").wait_for()
    for _ in range(5):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    first = page.locator(".pick").first
    assert first.get_attribute("aria-pressed") == "true"
    assert first.evaluate("(one) => one === document.activeElement")
    # The others step back, and its tag says its words.
    assert page.locator("#gap .box.faint:not(.true)").count() == page.locator(".pick").count() - 1
    assert page.locator("#gap .tag").first.inner_text() == "1 the big purple star"
    assert "the big purple star" in page.get_by_role("img").first.get_attribute("aria-label")


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_both_schemes_and_sizes(open_page, scheme, size):
    page = open_page(scheme=scheme, size=size)
    show_example(page)
    contrasts = page.evaluate(
        """() => {
            const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
            const light = (color) => {
                const [r, g, b] = numbers(color).map((one) => one / 255)
                    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const behind = (one) => {
                const color = getComputedStyle(one).backgroundColor;
                return numbers(color)[3] === 0 ? behind(one.parentElement) : color;
            };
            const hasText = (one) =>
                [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
            return [...document.body.querySelectorAll("*")].filter(hasText).map((one) => {
                const both = [light(getComputedStyle(one).color), light(behind(one))];
                return [one.textContent, (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)];
            });
        }"""
    )
    assert len(contrasts) > 30
    assert [one for one in contrasts if one[1] < 4.5] == []
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == (scheme == "dark")
    assert page.evaluate("() => document.documentElement.scrollWidth") == size["width"]
    frames = [page.locator(f"#{name} .frame").bounding_box() for name in ("gap", "compact")]
    # Side by side, equally large, on the screen at once.
    assert frames[0]["y"] == frames[1]["y"] and frames[0]["width"] == frames[1]["width"]
    assert all(0 <= one["y"] <= size["height"] - one["height"] for one in frames)
    small = [
        one.inner_text()
        for one in page.locator("button:visible").all()
        if one.bounding_box()["height"] < 40
    ]
    assert small == []


def test_a_calibrated_bundle_says_what_is_there(open_page):
    page = open_page()

    def judged(route: Any) -> None:
        answer = route.fetch()
        plain = answer.json()
        for at, one in enumerate(plain["groundings"]):
            one["found"] = one["boxes"][0]["found"] = at != 1
        route.fulfill(response=answer, json=plain)

    page.route("**/v1/ground", judged)
    show_example(page)
    assert page.get_by_role("status").inner_text().startswith("3 of 4 are there.")
    verdicts = [text.split(" ·")[0] for text in page.locator(".answer").all_inner_texts()]
    assert verdicts == [
        f"{name} {verdict}"
        for verdict in ("there", "not there", "there", "there")
        for name in ("GAP", "Compact")
    ]
    assert page.locator("#gap .box.absent").count() == 1


def test_an_error_is_shown_in_the_words_of_the_server(open_page):
    page = open_page()
    page.get_by_label("What to look for").fill("the red circle")
    drop(page, b"hello", "notes.txt", "text/plain")
    alert = page.get_by_role("alert")
    alert.get_by_text("not an image that can be read").wait_for()
    assert alert.inner_text().count("not an image") == 1
    show_example(page)
    assert not alert.is_visible()


def test_a_key_is_asked_for_and_kept_in_the_page(open_page, demo_bundle, tiny_bundle, tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n")
    with running(demo_bundle, tiny_bundle, api_keys=tmp_path / "keys") as served:
        page = open_page(served)
        field = page.get_by_label("This server asks for an API key")
        field.fill("wrong")
        field.press("Enter")
        page.get_by_role("alert").get_by_text("no right API key").wait_for()
        field.fill(KEY)
        page.get_by_role("button", name="Use the key").click()
        page.get_by_label("Model").select_option(tiny_bundle.name)
        assert not field.is_visible()
        show_example(page)
        stored = "() => localStorage.length + sessionStorage.length + document.cookie.length"
        assert page.evaluate(stored) == 0
        assert KEY not in page.content()
        assert field.input_value() == ""
        page.reload()
        field.wait_for()


def test_a_server_that_is_gone_is_said_to_be_gone(open_page, tiny_bundle):
    with running(tiny_bundle) as served:
        page = open_page(served)
        page.locator("#about", has_text="visual tokens").wait_for()
    page.get_by_role("button", name="Show an example").click()
    page.get_by_role("alert").get_by_text("The server does not answer.").wait_for()
