"""The page's files as they are served; test_page_in_browser.py uses them."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gap_export.evaluation.refshapes import generate_scene
from gap_export.serving.page import FILES, HEADERS
from tests.serving.conftest import running


@pytest.fixture(scope="module")
def page(served) -> dict[str, str]:
    with served.http() as http:
        answers = {path: http.get(path) for path in FILES}
    for path, answer in answers.items():
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(FILES[path][1])
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    return {path: answer.text for path, answer in answers.items()}


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def values(self, *names: str) -> list[str]:
        return [attrs[name] for _, attrs in self.found for name in names if attrs.get(name)]


def test_nothing_on_the_page_comes_from_another_host(page):
    for text in page.values():
        # Names of SVG and its elements, which nobody fetches.
        named = set(re.findall(r"\w*://[^'\" ]*", text)) - {"http://www.w3.org/2000/svg"}
        assert not named
    assert "import" not in page["/page.js"] and "url(" not in page["/page.css"]
    links = Elements(page["/"]).values("src", "href")
    assert [one for one in links if not one.startswith("data:")] == ["page.css", "page.js"]


def test_the_page_has_no_script_or_style_that_its_policy_would_refuse(page):
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    elements = Elements(page["/"]).found
    assert [attrs for tag, attrs in elements if tag == "script"] == [
        {"type": "module", "src": "page.js"}
    ]
    assert not [tag for tag, _ in elements if tag == "style"]
    assert not [name for _, attrs in elements for name in attrs if re.match(r"on|style$", name)]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", page["/page.js"])


def test_every_id_that_script_style_and_labels_ask_for_is_on_the_page(page):
    elements = Elements(page["/"])
    ids = elements.values("id")
    assert len(ids) == len(set(ids))
    asked = {
        name
        for argument in re.findall(r"\$\(([^)]*)\)", page["/page.js"])
        for name in re.findall(r'"([^"]+)"', argument)
    }
    styled = set(re.findall(r"#([a-z-]+)[^;{}]*\{", page["/page.css"]))
    assert len(asked) > 15
    assert asked | styled | set(elements.values("for", "aria-describedby")) <= set(ids)


@pytest.mark.parametrize("positions", ["gap", "compact"])
def test_an_answer_has_what_the_page_shows(served, page, pixels, positions):
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    asked = set(re.findall(r'form\.append\("(\w+)"', page["/page.js"]))
    form = {"expressions": ["a"], "model": served.worker.name, "kept_tokens": "true"}
    form["positions"] = positions
    assert asked == {*form, "image"}
    with served.http() as http:
        answer = http.post("/v1/ground", data=form, files={"image": ("image", png.getvalue())})
    (grounding,) = answer.json()["groundings"]
    (stages,) = re.findall(r"REQUEST_STAGES = \{(.*?)\}", page["/page.js"])
    assert set(re.findall(r"(\w+):", stages)) < set(answer.json()["timings_ms"])
    assert "total" in answer.json()["timings_ms"]
    assert len(grounding["keep_indices"]) < grounding["num_visual_tokens"]
    shown = "expression box boxes score found text warnings image_size timings_ms"
    assert set(shown.split()) <= set(grounding)
    (grid,) = grounding["tokens"]
    assert {"rows", "cols", "frame", "kept"} <= set(grid)


def test_an_example_is_a_held_out_scene_with_its_true_boxes(served):
    with served.http() as http:
        example = http.get("/v1/examples/7").json()
        refused = http.get("/v1/examples/10000")
    scene = generate_scene(split="heldout", seed=0, index=7, num_expressions=4)
    with Image.open(io.BytesIO(base64.b64decode(example["image"]))) as image:
        assert np.array_equal(np.asarray(image), scene.image)
    assert example["expressions"] == [one.text for one in scene.expressions]
    assert example["boxes"] == [list(scene.objects[one.target].box) for one in scene.expressions]
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"


def test_the_page_is_open_and_its_examples_are_behind_the_key(tiny_bundle, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef\n")
    with running(tiny_bundle, api_keys=keys) as served, served.http() as http:
        assert http.get("/").status_code == 200
        assert http.get("/v1/examples/0").status_code == 401
