"""Tokens that are expected and verified: fewer steps, and the very answers of the plain loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from gap_export.errors import ComputationError
from gap_export.runtime.backends.backend import Backend
from gap_export.runtime.expected_tokens import ExpectedTokens, generate_expecting
from gap_export.runtime.generation import assemble_prompt, generate
from gap_export.runtime.session import GroundingSession
from tests.runtime.fake_backends import FakeCache, VerifyingBackend
from tests.runtime.test_generation import HIDDEN, make_row

END, OPEN, COMMA, CLOSE = 2, 3, 4, 5
# Digits; what is below is not.
NUMBERS = 10


def has_digit(token: int) -> bool:
    return token >= NUMBERS


def expecting(*answers: list[int]) -> ExpectedTokens:
    found = ExpectedTokens(has_digit)
    for answer in answers:
        found.learn(answer)
    return found


def box(*numbers: int) -> list[int]:
    a, b, c, d = numbers
    return [OPEN, a, COMMA, b, COMMA, c, COMMA, d, CLOSE, END]


class Scripted(Backend):
    """Chooses the tokens of an answer where it was fed those before them, and other ones else."""

    name, dtype, num_logits = "scripted", "float32", 8

    def __init__(self, answer: list[int]) -> None:
        self.answer, self.steps = answer, 0
        self.fed: list[int] = []
        self.slots: list[int | None] = []

    def new_cache(self, batch_size: int, num_slots: int) -> FakeCache:
        return FakeCache(batch_size, num_slots)

    def run(self, component: str, feed: Any) -> Any:
        self.fed = feed["input_ids"][0].tolist()
        return {"inputs_embeds": np.zeros((1, len(self.fed), HIDDEN), np.float32)}

    def decode(self, feed: Any, cache: Any) -> Any:
        return self.decode_each(feed, cache)[-1:]

    def decode_each(self, feed: Any, cache: Any) -> Any:
        self.steps += 1
        shown = feed["attention_mask"][0].astype(bool)
        assert len(shown) <= cache.num_slots
        past = len(shown) - feed["inputs_embeds"].shape[1]
        prompt = not past
        self.slots[past:] = [None] * (len(shown) - past) if prompt else self.fed
        logits = np.zeros((1 if prompt else len(self.fed), 40), np.float32)
        for place in range(len(logits)):
            end = len(shown) if prompt else past + place + 1
            seen = [t for t, is_shown in zip(self.slots[:end], shown, strict=False) if is_shown]
            said = [token for token in seen if token is not None]
            is_right = said == self.answer[: len(said)] and len(said) < len(self.answer)
            logits[place, self.answer[len(said)] if is_right else 0] = 1
        return logits


@pytest.mark.parametrize("limit", [1, 2, 5, 9, 10, 20])
@pytest.mark.parametrize("kind", ["", "wide"])
def test_answers_are_those_of_the_plain_loop(sample_manifest, make_backend, limit, kind):
    """Answers of a random model, which guesses of any other answer never change."""
    rng = np.random.default_rng(4)
    vocabulary = sample_manifest.decoder.vocab_size
    num_wrong = 0
    for seed in range(12):
        prompt = assemble_prompt([make_row(2, 3, [0, 3, 9], seed=seed)], positions="gap")
        plain = generate(
            make_backend(sample_manifest), prompt, max_new_tokens=limit, eos_token_ids=(END,)
        )
        (answer,) = plain.token_ids
        # Right up to some place, and from there anything.
        draft = [*answer]
        draft[rng.integers(len(draft)) :] = rng.integers(3, vocabulary, 6).tolist()
        expected = ExpectedTokens(lambda token: bool(kind) and token % 2 == 0)
        for _ in range(2):
            expected.learn(draft)
        backend = VerifyingBackend(sample_manifest)
        given = generate_expecting(
            backend, prompt, expected, max_new_tokens=limit, eos_token_ids=(END,)
        )
        assert given.token_ids == plain.token_ids
        np.testing.assert_allclose(
            given.log_probabilities, plain.log_probabilities, rtol=1e-4, atol=1e-6
        )
        num_wrong += draft != list(answer)
    assert num_wrong > 6


def test_separators_go_in_with_the_token_before_them():
    prompt = assemble_prompt([make_row(1, 1, [0])], positions="gap")
    for draft, steps in (([], 10), ([box(11, 12, 13, 14)], 6)):
        backend = Scripted(box(21, 22, 23, 24))
        given = generate_expecting(
            backend, prompt, expecting(*draft), max_new_tokens=20, eos_token_ids=(END,)
        )
        assert list(given.token_ids[0]) == box(21, 22, 23, 24)
        assert backend.steps == steps


def test_what_is_expected_is_what_stood_there_in_every_answer():
    expected = expecting(box(11, 12, 13, 14))
    assert expected.guess([OPEN], 7) == []
    assert expected.guess([OPEN, 30], 7) == [COMMA]
    assert expected.guess([OPEN, 30, COMMA, 30, COMMA, 30, COMMA, 30], 7) == [CLOSE, END]
    assert expected.guess([OPEN, 30, COMMA, 30, COMMA, 30, COMMA, 30], 1) == [CLOSE]
    assert expected.guess([CLOSE], 7) == [] and expected.guess([OPEN, 30], 0) == []
    # A number that was the same twice, and one that was not.
    expected.learn(box(11, 13, 13, 14))
    assert expected.guess([OPEN], 7) == [11, COMMA]
    # Another syntax: the latest is expected.
    expected.learn([OPEN, 11, CLOSE, END])
    assert expected.guess([OPEN, 30], 7) == [CLOSE, END]


def test_beginnings_do_not_pile_up():
    expected = ExpectedTokens(lambda _: False)
    for number in range(3000):
        expected.learn([number, 1, 2])
    assert len(expected._next) < 5000


def test_logits_that_choose_nothing_are_an_error_there_too(sample_manifest):
    backend = VerifyingBackend(sample_manifest)
    backend._head[:] = np.nan
    prompt = assemble_prompt([make_row(1, 1, [0])], positions="gap")
    with pytest.raises(ComputationError):
        generate_expecting(backend, prompt, expecting(), max_new_tokens=4, eos_token_ids=(END,))


def test_a_session_verifies_where_its_backend_can(sample_manifest, tokenizer_folder, image):
    manifest = dataclasses.replace(
        sample_manifest, prompt=dataclasses.replace(sample_manifest.prompt, max_new_tokens=8)
    )
    backend = VerifyingBackend(manifest)
    with GroundingSession(manifest, tokenizer_folder, backend) as session:
        first, again = (session.ground(image, "the star") for _ in range(2))
        num_steps = len(backend.ids_seen)
        third = session.ground(image, "the star")
        assert len(backend.ids_seen) - num_steps <= num_steps
        assert first.token_ids == again.token_ids == third.token_ids
        with session.look(image) as view:
            assert view.ground("the star").token_ids == first.token_ids
