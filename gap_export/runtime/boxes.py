"""From the answer's text to a box in pixels of the image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from gap_export.runtime.images.geometry import Box, ImageGeometry
from gap_export.spec.manifest import BoxSpec

# Bounded digits: no number overflows a float, and matching stays linear.
_NUMBER = r"([+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}))"
_INTEGER = r"<\s*(\d{1,9})\s*>"
_CORNER = r"\(\s*" + r"\s*,\s*".join([_NUMBER] * 2) + r"\s*\)"
_SYNTAXES = {
    "bracketed": re.compile(r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]", re.ASCII),
    "angled": re.compile(r"\{\s*" + r"\s*".join([_INTEGER] * 4) + r"\s*\}", re.ASCII),
    # What marks it are special tokens, which are left out of the text.
    "corners": re.compile(_CORNER + r"\s*,\s*" + _CORNER, re.ASCII),
}

# What is read besides. Words, numbers and signs that touch are one piece, so "1e3" is no number.
_PIECE = re.compile(r"[\w.+-]+|[\[\](){},;%]|[^\w\s.+\-\[\](){},;%]+")
_LOOSE_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})")
_ANGLED_NUMBER = re.compile(_INTEGER, re.ASCII)
_BETWEEN_ANGLED = " \t\r\n,;"


def _list_of_four(number: str) -> re.Pattern[str]:
    """Lists of four numbers, their pieces one space apart: closed, or with one bracket missing."""
    either = r"[\[({] " + " (?:[,;] )?".join([number] * 4) + r"(?: [,;])? [\])}]"
    commas = " , ".join([number] * 4)
    return re.compile(rf"{either}|\[ {commas}(?: ,)?|{commas}(?: ,)? \]")


_LISTS = (_list_of_four(r"[^ %,;\[\](){}]+"), _list_of_four(r"[^ %,;\[\](){}]+ %"))
# Bounded space, for the same reason as digits.
_GAP = r"\s{0,9}"
_LOOSE_CORNER = rf"[\[({{]{_GAP}{_NUMBER}{_GAP}[,;\s]{_GAP}{_NUMBER}{_GAP}[\])}}]"
_LOOSE_CORNERS = re.compile(rf"{_LOOSE_CORNER}{_GAP}[,;]?{_GAP}{_LOOSE_CORNER}", re.ASCII)
# Four numbers and two brackets; with percent signs, and a separator after each, at most.
_MIN_PIECES, _MAX_PIECES = 6, 14


# To what x and y run.
Ends = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ParsedBox:
    """A box found in an answer.

    Attributes:
        fractions: Two corners in the order given, 0..1 where the model keeps to its frame.
        exact: Whether it is written in the model's syntax; else it was read with tolerance.
        span: Its first character in the answer, and the one behind its last; where it was read with
            tolerance, of the whole answer.
    """

    fractions: Box
    exact: bool
    span: tuple[int, int]


def parse_answer(text: str, spec: BoxSpec) -> ParsedBox | None:
    """The first box in a text that is written in the model's syntax; else the first one meant.

    What is meant must be four numbers and no more:

    * ``bracketed``: in round, square or curly brackets, which need not match, with commas,
      semicolons or space between; or with one square bracket missing and commas between. Numbers
      that all have a percent sign are hundredths of the frame, on any scale.
    * ``angled``: one after the other, with or without braces; commas between do not count.
    * ``corners``: two and two in brackets of any kind, with or without a comma between those; or as
      ``bracketed``.

    Not read: a list without any bracket, numbers with exponents, named coordinates, and corners in
    brackets of their own but by ``corners``. Words around a box do not matter. Time is linear in
    the text's length.

    Returns:
        None where there is no box.
    """
    return next(iter(parse_boxes(text, spec, most=1)), None)


def parse_boxes(text: str, spec: BoxSpec, *, most: int) -> list[ParsedBox]:
    """The first boxes in the model's syntax; without any, the one that :func:`parse_answer` gives.

    Args:
        text: The model's answer.
        spec: Syntax and scale.
        most: How many are read at most.
    """
    exact = islice(_SYNTAXES[spec.syntax].finditer(text), most)
    found = [
        ParsedBox(fractions=_scaled(one.groups(), spec.ends), exact=True, span=one.span())
        for one in exact
    ]
    if not found and (meant := _MEANT[spec.syntax](text, spec.ends)) is not None:
        return [ParsedBox(fractions=meant, exact=False, span=(0, len(text)))]
    return found


def parse_box(text: str, spec: BoxSpec) -> Box | None:
    """Coordinates of the first box in a text that is written in the model's syntax.

    Args:
        text: The model's answer.
        spec: Syntax and scale; in either syntax space between its parts does not count.

    Returns:
        Two corners in the order given, 0..1 where the model keeps to its frame; None without a box,
        and where ``parse_answer`` needs tolerance to find one.
    """
    found = _SYNTAXES[spec.syntax].search(text)
    return None if found is None else _scaled(found.groups(), spec.ends)


def to_pixels(box: Box, spec: BoxSpec, geometry: ImageGeometry) -> Box | None:
    """Place fractions of the answer's frame in the image.

    Corners are put in order and clipped to the image: for a padded square of side S
    x = fraction * S - (S - W) // 2, for the image itself x = fraction * W; y alike.

    Returns:
        x1 < x2 and y1 < y2 in pixels, within the image; None where nothing of the box is.
    """
    frame = geometry.box_frame(spec)
    x1, x2 = sorted(
        _clip(frame.left + fraction * frame.width, geometry.width) for fraction in box[0::2]
    )
    y1, y2 = sorted(
        _clip(frame.top + fraction * frame.height, geometry.height) for fraction in box[1::2]
    )
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _clip(value: float, upper: int) -> float:
    return min(max(value, 0.0), float(upper))


def _bracketed_meant(text: str, ends: Ends) -> Box | None:
    for pieces in _lists(text):
        if not _MIN_PIECES <= len(pieces) <= _MAX_PIECES:
            continue
        for pattern, full in zip(_LISTS, (ends, (100.0, 100.0)), strict=True):
            if pattern.fullmatch(" ".join(pieces)):
                return _scaled([piece for piece in pieces if _is_number(piece)], full)
    return None


def _lists(text: str) -> Iterator[list[str]]:
    """Stretches of numbers, percent signs and separators, with the brackets at their ends."""
    pieces: list[str] = []
    for piece in _PIECE.findall(text):
        if piece in "[({":
            yield pieces
            pieces = [piece]
        elif piece in "])}":
            yield [*pieces, piece]
            pieces = []
        elif piece in ",;%" or _is_number(piece):
            pieces.append(piece)
        else:
            # "0.4." ends a sentence; in "4.." or "0.4.5" nothing is a number.
            last = [piece[:-1]] if piece[-1] == "." and _is_number(piece[:-1]) else []
            yield [*pieces, *last]
            pieces = []
    yield pieces


def _is_number(piece: str) -> bool:
    return _LOOSE_NUMBER.fullmatch(piece) is not None


def _corners_meant(text: str, ends: Ends) -> Box | None:
    found = _LOOSE_CORNERS.search(text)
    return _bracketed_meant(text, ends) if found is None else _scaled(found.groups(), ends)


def _angled_meant(text: str, ends: Ends) -> Box | None:
    numbers: list[str] = []
    end = 0
    for found in _ANGLED_NUMBER.finditer(text):
        if text[end : found.start()].strip(_BETWEEN_ANGLED):
            if len(numbers) == 4:
                break
            numbers = []
        numbers.append(found.group(1))
        end = found.end()
    return _scaled(numbers, ends) if len(numbers) == 4 else None


_MEANT = {
    "bracketed": _bracketed_meant,
    "angled": _angled_meant,
    "corners": _corners_meant,
}


def _scaled(numbers: Sequence[str], ends: Ends) -> Box:
    x1, y1, x2, y2 = (
        float(number) / end for number, end in zip(numbers, (*ends, *ends), strict=True)
    )
    return x1, y1, x2, y2
