"""Constrained answers: what is begun of a box is finished, and none ends before it holds one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from gap_export.errors import UsageError
from gap_export.runtime.box_grammar import BoxGrammar
from gap_export.runtime.boxes import parse_box
from gap_export.runtime.prompt import PromptEncoder
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import BoxSpec
from gap_export.spec.recipe import find_recipe

END = 0


def spec_of(syntax: Any) -> BoxSpec:
    recipe, _ = find_recipe("refshapes-llava")
    return dataclasses.replace(recipe.box, syntax=syntax)


def grammar_of(syntax: str, pieces: list[str]) -> tuple[BoxGrammar, list[str]]:
    texts = ["", *pieces]
    return BoxGrammar(spec_of(syntax), dict(enumerate(texts)), (END,)), texts


SIGNS = [*"0123456789", *"[](){}<>", ",", ", ", ".", "-", " ", "cat", "0.", ">,", "]}", "12", "x1"]


@pytest.mark.parametrize(
    ("syntax", "text", "allowed"),
    [
        ("bracketed", "[1", {*"0123456789", ",", ", ", ".", " ", "12", "0."}),
        ("bracketed", "[1, 2, 3, 4", {*"0123456789", "]", "]}", ".", " ", "12", "0."}),
        ("bracketed", "[1, 2, 3, 0.", {*"0123456789", "]", "]}", " ", "12"}),
        ("bracketed", "the cat [1,", {*"0123456789", ".", "-", " ", "12", "0."}),
        ("angled", "{<1", {*"0123456789", ">", " ", "12"}),
        ("angled", "{<1>", {"<", " "}),
        ("corners", "(1,2)", {",", ", ", " "}),
        ("corners", "(1,2),(3,4", {*"0123456789", ")", ".", " ", "12", "0."}),
    ],
)
def test_within_a_box_only_its_syntax_goes_on(syntax, text, allowed):
    grammar, texts = grammar_of(syntax, [*SIGNS, text])
    ids = grammar._allowed([texts.index(text)])
    assert ids is not None
    assert {texts[token] for token in ids} == allowed


def test_tokens_beyond_the_models_logits_are_not_chosen():
    grammar, texts = grammar_of("bracketed", SIGNS)
    logits = np.zeros((1, len(texts) - 1), dtype=np.float32)
    found = grammar.constrain(logits, [[]])
    assert found[0, END] == -np.inf and (found[0, 1:] == 0).all()


@pytest.mark.parametrize(
    ("syntax", "text"),
    [("bracketed", ""), ("bracketed", "the cat"), ("bracketed", "[\n{"), ("angled", "<1>")],
)
def test_before_a_box_everything_but_the_end_may_come(syntax, text):
    grammar, texts = grammar_of(syntax, [*SIGNS, text] if text else SIGNS)
    ids = grammar._allowed([texts.index(text)] if text else [])
    assert ids is not None and set(ids.tolist()) == set(range(1, len(texts)))


def test_behind_a_box_and_behind_the_end_a_model_is_free():
    grammar, _ = grammar_of("bracketed", ["[1,2,3,4]", "dog"])
    assert grammar._allowed([1]) is None and grammar._allowed([1, 2]) is None
    assert grammar._allowed([END]) is None
    logits = np.zeros((2, 3), np.float32)
    assert np.array_equal(grammar.constrain(logits, [[1], [END]]), logits)
    hidden = grammar.constrain(logits, [[1], [2]])
    assert hidden[1].tolist() == [-np.inf, 0, 0] and not logits.any()


NAMES = ["refshapes-llava", "refshapes-shikra", "refshapes-minigpt-v2", "refshapes-qwen3-vl"]


@pytest.mark.parametrize("name", NAMES)
def test_a_box_of_a_model_s_own_tokens_is_always_finished(name):
    """Whatever the logits are, once a box is begun; the tokens are those of the demo models."""
    recipe, folder = find_recipe(name)
    prompts: Any = object.__new__(PromptEncoder)
    prompts._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = PromptEncoder.pieces(prompts)
    grammar = BoxGrammar(recipe.box, pieces, (END,))
    begun = {"bracketed": "[0", "angled": "{<1", "corners": "(0"}[recipe.box.syntax]
    opening = prompts._tokenizer.encode(begun, add_special_tokens=False).ids
    rng = np.random.default_rng(8)
    for _ in range(6):
        answer = list(opening)
        for _ in range(80):
            logits = rng.normal(size=(1, max(pieces) + 1)).astype(np.float32)
            answer.append(int(grammar.constrain(logits, [answer])[0].argmax()))
            text = prompts._tokenizer.decode(answer, skip_special_tokens=True)
            if parse_box(text, recipe.box) is not None:
                break
        assert parse_box(text, recipe.box) is not None, text


def test_a_session_takes_it_by_name_alone(sample_manifest, make_session, image):
    free, bound = make_session(sample_manifest), make_session(sample_manifest, grammar="box")
    words = ["the star", "blue square"]
    assert len(free.ground_batch(image, words)) == 2
    for answer in bound.ground_batch(image, words):
        ends = sample_manifest.decoder.eos_token_ids
        assert answer.token_ids[-1] not in ends or parse_box(answer.text, sample_manifest.box)
    with pytest.raises(UsageError, match="no such grammar: 'json'"):
        make_session(sample_manifest, grammar="json")
    assert isinstance(bound, GroundingSession)
