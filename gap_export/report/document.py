"""What a report says, apart from how it is written.

``check`` and ``eval`` each fill a :class:`Document`; every writer renders any of them. All text is
plain and free of control characters here; each format escapes it in its own way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeVar

_Row = TypeVar("_Row")
Status = Literal["passed", "failed", "not_run"]
STATUS_WORDS: Mapping[str, str] = MappingProxyType(
    {"passed": "passed", "failed": "FAILED", "not_run": "not run"}
)
# Such as 5.4e-138, 93.0 %, +88.6 to +93.6, 61.2 / 70.1, < 1e-300 and inf.
_NUMBER = r"[<>]? ?[-+]?(?:\d[\d.,]*(?:e[-+]?\d+)?|inf|nan)(?: %)?"
_NUMBERS = re.compile(rf"{_NUMBER}(?:(?: to | / |-){_NUMBER})?(?: \({_NUMBER} to {_NUMBER}\))?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows.

    Attributes:
        rows: As many cells each as there are columns; the first one names the row.
        failed: Indices of the rows that are not as they should be.
        notes: Lines below it.
        is_long: There may be hundreds of rows, of which a summary shows the failed ones alone.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    failed: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    is_long: bool = False

    @classmethod
    def of(
        cls,
        title: str,
        rows: Sequence[_Row],
        columns: Mapping[str, Callable[[_Row], object]],
        *,
        failed: Callable[[_Row], bool] = lambda _: False,
        notes: Sequence[str] = (),
        is_long: bool = False,
    ) -> Table:
        """A table of records.

        Args:
            title: What it shows.
            rows: The records.
            columns: How a record's cells are made, by the names of the columns.
            failed: Whether a record is not as it should be.
            notes: Lines below it.
            is_long: As the attribute.
        """
        return cls(
            title=title,
            header=tuple(columns),
            rows=tuple(tuple(str(cell(row)) for cell in columns.values()) for row in rows),
            failed=frozenset(index for index, row in enumerate(rows) if failed(row)),
            notes=tuple(notes),
            is_long=is_long,
        )

    def numeric_columns(self) -> frozenset[int]:
        """Indices of the columns that hold numbers alone, which are aligned at the right."""
        columns = [[cell for cell in column if cell] for column in zip(*self.rows, strict=True)]
        return frozenset(
            index
            for index, cells in enumerate(columns)
            if index and cells and all(map(_NUMBERS.fullmatch, cells))
        )


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot.

    Attributes:
        caption: What it shows, in words.
        draw: Gives an ``<svg>`` element whose ids begin with the text it is called with. It needs
            matplotlib, and is called by writers that show figures.
        title: Stands above it; may be empty.
    """

    caption: str
    draw: Callable[[str], str]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """How a box is drawn over an image whose longer side is 400.

    Attributes:
        label: Whose box it is.
        dashes: Lengths of a dash and of the gap after it; empty for a solid line.
    """

    label: str
    color: str
    width: float
    dashes: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A line below an image: what a setting answered, and how its box is drawn, if it is."""

    stroke: Stroke | None
    setting: str
    iou: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One question of a gallery.

    Attributes:
        alt: The image in words.
        uri: The image as ``data:``; empty where it could not be loaded.
        problem: Why it could not be loaded.
        size: Width and height that the image is drawn with.
        boxes: What is drawn over it, in this order: left, top, width and height in that size.
        answers: Those of the settings whose boxes are drawn come first.
    """

    question: str
    expression: str
    alt: str
    uri: str
    problem: str
    size: tuple[float, float]
    boxes: tuple[tuple[Stroke, tuple[float, float, float, float]], ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Questions that were chosen for the same reason, which is the title."""

    title: str
    strokes: tuple[Stroke, ...]
    cards: tuple[Card, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report.

    Attributes:
        depth: 2, or 3 for a part of the section before it.
        status: Verdict beside the heading, where it has one.
        callouts: Sentences that should not be missed.
        tables: Tables without rows are left out.
        figures: Plots, which stand before the tables.
        gallery: Loads images with boxes; called by writers that show them.
    """

    title: str
    depth: Literal[2, 3] = 2
    status: Status | None = None
    callouts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    gallery: Callable[[], Sequence[Shelf]] = lambda: ()


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number to be seen first; or a verdict, and then it has a status."""

    label: str
    value: str
    status: Status | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """A report for people.

    Attributes:
        command: ``check`` or ``eval``.
        title: What it is about, or the verdict.
        status: The verdict, where there is one.
        lead: The result in a sentence; empty where the title says it.
        tiles: The same as ``lead`` for writers that show more than lines of text.
        problems_title: Heading of the problems.
        problems: What is wrong or doubtful, a sentence each.
        facts: What was measured and how, by name.
        sections: The parts, in order.
        schema_version: Version of the JSON form of the same report.
    """

    command: str
    title: str
    status: Status | None = None
    lead: str = ""
    tiles: tuple[Tile, ...] = ()
    problems_title: str = ""
    problems: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    schema_version: int

    @property
    def heading(self) -> str:
        """Command and title, by which a file is recognized as one of ours."""
        return f"gap-export {self.command}: {self.title}"
