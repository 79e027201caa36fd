"""``Grounding.score``: what it is, and that no way of decoding changes it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gap_export.errors import ComputationError, UsageError
from gap_export.evaluation.refshapes import generate_scene
from gap_export.runtime.answers import box_tokens, read_answer
from gap_export.runtime.computed import log_probabilities
from gap_export.runtime.images.geometry import ImageGeometry
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import BoxSpec

PIECES = ["", "see ", "", "(1", "2,", "3)", ",(4,5", ")", "", " there", ""]
TEXT = "see (12,3),(4,5) there"


def decode(token_ids: tuple[int, ...]) -> str:
    return "".join(PIECES[token] for token in token_ids).strip()


def test_box_tokens_are_those_from_its_first_to_its_last_character():
    tokens = tuple(range(len(PIECES)))
    assert decode(tokens) == TEXT
    span = TEXT.index("("), TEXT.index(" there")
    assert box_tokens(tokens, span, decode) == slice(3, 8)
    # A token that holds more than the box is one of them.
    assert box_tokens(tokens, (span[0] + 1, span[1] - 2), decode) == slice(3, 7)
    assert box_tokens(tokens, (0, len(TEXT)), decode) == slice(1, 10)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_log_probability_is_the_softmax_of_any_token(dtype):
    rng = np.random.default_rng(3)
    logits = (30 * rng.normal(size=(5, 70_000))).astype(dtype)
    logits[0, :100] = -np.inf
    tokens = rng.integers(100, 70_000, 5)
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    expected = shifted[range(5), tokens] - np.log(np.exp(shifted).sum(axis=1))
    found = log_probabilities(logits, tokens, step=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_without_a_softmax_are_an_error(value):
    logits = np.zeros((2, 9), np.float32)
    logits[1, 3] = value
    with pytest.raises(ComputationError, match="row 1, at step 4"):
        log_probabilities(logits, np.array([0, 0]), step=4)


@pytest.fixture(scope="module")
def asked() -> tuple[Any, list[str]]:
    scene = generate_scene(split="heldout", seed=0, index=3)
    return scene.image, [one.text for one in scene.expressions[:3]]


@pytest.fixture(scope="module")
def reference(demo_bundle, asked) -> list[float]:
    """Scores of the portable graphs, which verify no expected tokens, one after the other."""
    image, texts = asked
    with GroundingSession.open(demo_bundle, form="base") as session:
        assert session.backend.num_logits == 1
        found = [session.ground(image, text).score for text in texts]
    assert all(0 < score < 1 for score in found if score is not None) and len(set(found)) == 3
    return [score or 0.0 for score in found]


@pytest.mark.parametrize(
    "options",
    [{}, {"grammar": "box"}, {"form": "base", "positions": "gap"}, {"backend": "openvino"}],
    ids=["verified", "grammar", "base", "openvino"],
)
def test_score_is_the_same_however_it_is_decoded(demo_bundle, asked, reference, options):
    image, texts = asked
    with GroundingSession.open(demo_bundle, **options) as session:
        alone = [session.ground(image, text) for text in texts]
        # Now tokens are expected, where the backend verifies any.
        again = [session.ground(image, text).score for text in texts]
        together = session.ground_batch(image, texts)
        with session.look(image) as view:
            looked = [view.ground(text).score for text in texts]
    for scores in ([one.score for one in alone], again, [one.score for one in together], looked):
        np.testing.assert_allclose(scores, reference, rtol=2e-3)
    assert all(one.found is None and one.boxes[0].box == one.box for one in alone)


def test_score_is_the_product_of_the_box_tokens_probabilities(demo_bundle, asked, monkeypatch):
    image, texts = asked
    steps: list[float] = []
    with GroundingSession.open(demo_bundle, form="base") as session:
        decode_one = session.backend.decode

        def spy(feed: Any, cache: Any) -> Any:
            logits = decode_one(feed, cache)
            wide = logits[0].astype(np.float64)
            steps.append(float(np.exp(wide.max()) / np.exp(wide).sum()))
            return logits

        monkeypatch.setattr(session.backend, "decode", spy)
        answer = session.ground(image, texts[0])
        pieces = [session._prompts.decode((token,)) for token in answer.token_ids]
    probabilities = steps[-len(pieces) :]
    first = next(place for place, piece in enumerate(pieces) if "[" in piece)
    last = next(place for place, piece in enumerate(pieces) if "]" in piece)
    assert answer.score == pytest.approx(math.prod(probabilities[first : last + 1]), rel=1e-4)


def test_an_answer_without_a_box_has_no_score(tiny_bundle):
    image = np.zeros((32, 32, 3), np.uint8)
    with GroundingSession.open(tiny_bundle) as session:
        answer = session.ground(image, "the cup")
    assert answer.box is None and answer.score is None and answer.boxes == ()
    assert answer.to_plain()["score"] is None


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("bracketed", "<ref>cups</ref><box>[[10, 20, 30, 40], [50, 50, 50, 60], [50, 60, 70, 80]]"),
        ("bracketed", '[{"bbox_2d": [10, 20, 30, 40]}, {"bbox_2d": [50, 60, 70, 80]}]'),
        ("corners", "(10,20),(30,40)(50,60),(70,80)"),
        ("angled", "{<10><20><30><40>}<delim>{<50><60><70><80>}"),
    ],
)  # fmt: skip
def test_a_list_has_as_many_boxes_as_are_asked_for(syntax, text):
    spec = BoxSpec(syntax=syntax, scale=100.0, frame="image")
    manifest: Any = SimpleNamespace(box=spec, decoder=SimpleNamespace(eos_token_ids=(2,)))
    geometry = ImageGeometry(width=100, height=100)
    both, warnings = read_answer(text, (2,), manifest, geometry, max_boxes=5)
    assert [one.box for one in both] == [(10, 20, 30, 40), (50, 60, 70, 80)]
    # Each is read from where it stands; one without area is left out, and said.
    assert all(str(int(one.box[0])) in text[slice(*one.span)] for one in both)
    assert len(warnings) == ("50, 50, 50" in text)
    assert [one.box for one in read_answer(text, (2,), manifest, geometry)[0]] == [both[0].box]


def test_every_box_of_an_answer_has_a_score_of_its_own(demo_bundle, asked, monkeypatch):
    image, texts = asked
    written = "[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]"
    with GroundingSession.open(demo_bundle, max_boxes=2) as session:
        monkeypatch.setattr(session._prompts, "decode", lambda ids: written[: 9 * len(ids)].strip())
        answer = session.ground(image, texts[0])
    first, second = answer.boxes
    assert answer.box == first.box != second.box and answer.score == first.score
    assert answer.to_plain()["boxes"][1]["score"] == pytest.approx(second.score, rel=1e-5)
    with pytest.raises(UsageError, match="number of boxes"):
        GroundingSession.open(demo_bundle, max_boxes=0)
