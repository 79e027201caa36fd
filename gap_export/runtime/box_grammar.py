"""Constrained decoding: an answer does not end before it holds a box, and a box is well-formed.

This is another way of answering than the model's own, and never the default: where a model would
have said that there is nothing, or begun a box and broken off, it is made to give one.

What stands before a box is the model's own, so that words and special tokens around it stay. A box
has begun with the first digit behind its opening bracket; from there to its end only tokens are
chosen that its syntax goes on with, the most likely of them. Behind it the model is free again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gap_export.runtime.backends.backend import FloatArray
from gap_export.spec.manifest import BoxSpec

# Bounded space, so that no box is nothing but space.
_SPACE = r"\s{0,2}"
_DIGIT = re.compile(r"[0-9]")
_NUMBER = (
    r"[+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})",
    r"[+-]?[0-9]{0,9}(?:\.[0-9]{0,9})?",
)
_WHOLE = ("[0-9]{1,9}", "[0-9]{0,9}")
# Of each part of a box how it reads in full, and how as far as it goes.
_Part = tuple[str, str]


def _sign(text: str) -> _Part:
    sign = re.escape(text)
    return f"{_SPACE}{sign}{_SPACE}", f"{_SPACE}(?:{sign}{_SPACE})?"


def _between(part: _Part, separator: str, count: int) -> list[_Part]:
    found = [part]
    for _ in range(count - 1):
        found += [_sign(separator), part]
    return found


_CORNER = [_sign("("), *_between(_NUMBER, ",", 2), _sign(")")]
_PARTS: Mapping[str, list[_Part]] = {
    "bracketed": [_sign("["), *_between(_NUMBER, ",", 4), _sign("]")],
    "angled": [_sign("{"), *[_sign("<"), _WHOLE, _sign(">")] * 4, _sign("}")],
    "corners": [*_CORNER, _sign(","), *_CORNER],
}


class BoxGrammar:
    """What a box of one syntax may go on with.

    Args:
        spec: Of the model's boxes.
        pieces: Text of every token of the model's tokenizer as it stands behind another one; ``""``
            for those that leave no text.
        eos_token_ids: Tokens that end an answer.
    """

    def __init__(
        self, spec: BoxSpec, pieces: Mapping[int, str], eos_token_ids: Sequence[int]
    ) -> None:
        parts = _PARTS[spec.syntax]
        begun = parts[-1][1]
        for full, partly in reversed(parts[:-1]):
            begun = f"(?:{full}{begun}|{partly})"
        self._begun = re.compile(begun)
        self._whole = re.compile("".join(full for full, _ in parts))
        self._opening = {"bracketed": "[", "angled": "{", "corners": "("}[spec.syntax]
        self._pieces, self._eos = pieces, list(eos_token_ids)
        signs = set("0123456789+-., \t\r\n[](){}<>")
        self._candidates = [
            (token, text) for token, text in sorted(pieces.items()) if text and text[0] in signs
        ]

    def constrain(self, logits: FloatArray, answers: Sequence[Sequence[int]]) -> FloatArray:
        """Logits [B, V], with -inf where a token is not allowed.

        Args:
            logits: Of each row's next token; they are not changed.
            answers: Each row's tokens so far; those of an ended row are let be.
        """
        found = logits.copy()
        for row, answer in enumerate(answers):
            allowed = self._allowed(answer)
            if allowed is not None:
                hidden = np.ones(logits.shape[1], dtype=np.bool_)
                # A tokenizer may have more tokens than the model has logits.
                hidden[allowed[allowed < len(hidden)]] = False
                found[row, hidden] = -np.inf
        return found

    def _allowed(self, answer: Sequence[int]) -> NDArray[np.int64] | None:
        """Ids that may come next; None for any."""
        if answer and answer[-1] in self._eos:
            return None
        text = "".join(self._pieces.get(token, "") for token in answer)
        if self._whole.search(text):
            return None
        box = self._find_begun(text)
        if box is not None:
            allowed = [
                token
                for token, piece in self._candidates
                if self._begun.fullmatch(box + piece) or self._whole.match(box + piece)
            ]
            if allowed:
                return np.array(allowed, dtype=np.int64)
        ids = np.array(sorted(self._pieces), dtype=np.int64)
        return ids[~np.isin(ids, self._eos)]

    def _find_begun(self, text: str) -> str | None:
        """The box that a text ends within, from its opening bracket on."""
        start = text.find(self._opening)
        while start >= 0:
            box = text[start:]
            if _DIGIT.search(box) and self._begun.fullmatch(box):
                return box
            start = text.find(self._opening, start + 1)
        return None
