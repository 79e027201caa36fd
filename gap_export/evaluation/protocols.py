"""When an answer is right: the conventions that published numbers follow, each under its name.

They differ in the frame in which two boxes are compared, in how the true box is rounded, and in
whether an IoU of exactly the threshold hits. Numbers are comparable under one protocol only. What
is the same in all: an answer that is not read has IoU 0 and counts as wrong; and a picture has the
size it was loaded with.

Answers are read as ``runtime.boxes.parse_answer`` does. Only under ``lmms`` are they read as its
own program does, for its published numbers hang on it; Shikra's counts an answer with two boxes as
wrong, and MiniGPT-v2's one that does not begin with a box.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gap_export.errors import UsageError
from gap_export.evaluation.questions import Question
from gap_export.evaluation.records import Record
from gap_export.manifest import BoxSpec
from gap_export.parity.metrics import Box, intersection_over_union
from gap_export.runtime.geometry import Frame, ImageGeometry

__all__ = ["NATIVE", "PROTOCOLS", "Protocol", "applicable", "resolve_protocol"]

NATIVE = "native"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One convention.

    Attributes:
        name: On the command line and in reports.
        summary: One line for reports.
        source: Where it is from.
        families: Model families whose authors report under it.
        syntaxes: Ways to write a box that its program reads.
        read: An answer's box as the protocol takes it, in 0..1 of the model's frame; None where it
            finds none.
        compare: IoU of what was read with the true box.
        reaches: Whether an IoU hits at a threshold.
    """

    name: str
    summary: str
    source: str
    families: tuple[str, ...] = ()
    syntaxes: tuple[str, ...] = ("bracketed", "angled")
    read: Callable[[Record], Box | None]
    compare: Callable[[Box, Record, Question, BoxSpec], float]
    reaches: Callable[[float, float], bool]

    def iou(self, record: Record, question: Question, box_spec: BoxSpec) -> float:
        """IoU of an answer with the true box, in 0..1; 0 where no box is read.

        Args:
            record: The answer.
            question: What was asked.
            box_spec: Of the model that answered.
        """
        box = self.read(record)
        return 0.0 if box is None else self.compare(box, record, question, box_spec)

    def is_hit(self, iou: float, threshold: float = 0.5) -> bool:
        """Whether an IoU counts as right."""
        return self.reaches(iou, threshold)


def resolve_protocol(name: str, family: str, box_spec: BoxSpec) -> Protocol:
    """The protocol of a name; ``native`` is the one that the family's authors use, else ``unpad``.

    Args:
        name: One of ``PROTOCOLS``, or ``native``.
        family: The model's family.
        box_spec: How the model writes boxes.

    Raises:
        UsageError: no protocol of that name, or one that does not read the model's boxes.
    """
    if name == NATIVE:
        theirs = [protocol for protocol in PROTOCOLS.values() if family in protocol.families]
        return theirs[0] if theirs else PROTOCOLS["unpad"]
    if name not in PROTOCOLS:
        raise UsageError(
            "there is no such protocol", seen=repr(name), allowed=", ".join([NATIVE, *PROTOCOLS])
        )
    protocol = PROTOCOLS[name]
    if box_spec.syntax not in protocol.syntaxes:
        raise UsageError(
            "the protocol does not read this model's boxes, so every answer would be wrong",
            seen=f"{name}, and boxes that are {box_spec.syntax}",
            allowed=", ".join([NATIVE, *(one.name for one in applicable(box_spec))]),
        )
    return protocol


def applicable(box_spec: BoxSpec) -> tuple[Protocol, ...]:
    """The protocols that read boxes written so."""
    return tuple(one for one in PROTOCOLS.values() if box_spec.syntax in one.syntaxes)


def _fractions(record: Record) -> Box | None:
    return record.fractions


# Floats in square brackets. Stricter than our own reading: no plus sign, no ".5", no space before a
# comma, and nothing is divided by the model's scale.
_FLOAT = r"(-?\d+(?:\.\d+)?)"
_FLOATS = re.compile(r"\[\s*" + r",\s*".join([_FLOAT] * 4) + r"\s*\]")


def _first_four_floats(record: Record) -> Box | None:
    found = _FLOATS.search(record.text)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in found.groups())
    # Hundreds of digits make infinity, of which no area can be had.
    return (x1, y1, x2, y2) if math.isfinite(x1 + y1 + x2 + y2) else None


def _in_pixels(_: Box, record: Record, question: Question, __: BoxSpec) -> float:
    """What the runtime answers, in pixels of the picture: corners in order, clipped."""
    return 0.0 if record.box is None else intersection_over_union(record.box, question.box)


def _as_fractions_of_the_picture(box: Box, record: Record, question: Question, _: BoxSpec) -> float:
    """The answer as it stands, though it may refer to the padded square."""
    width, height = record.image_size
    picture = Frame(left=0, top=0, width=width, height=height)
    return intersection_over_union(box, _to_fractions(question.box, picture))


def _in_the_model_s_frame(box: Box, record: Record, question: Question, box_spec: BoxSpec) -> float:
    """The truth as the model would write it, clipped to its frame and in three decimals."""
    truth = _to_fractions(question.box, _frame(record, box_spec))
    x1, y1, x2, y2 = (round(min(max(value, 0.0), 1.0), 3) for value in truth)
    return intersection_over_union(box, (x1, y1, x2, y2))


def _in_pixels_with_both_ends(box: Box, record: Record, question: Question, _: BoxSpec) -> float:
    """Coordinates are taken for indices of pixels, and both ends belong to the box."""
    width, height = record.image_size
    x1, y1, x2, y2 = box
    answer = (x1 * width, y1 * height, x2 * width, y2 * height)
    return intersection_over_union(_with_last_pixel(answer), _with_last_pixel(question.box))


def _in_hundredths_of_the_picture(
    box: Box, record: Record, question: Question, box_spec: BoxSpec
) -> float:
    """The answer without its padding, clipped to the picture; the truth in two decimals.

    Its own program compares answers about a padded square as they stand, and refuses those beyond
    0..1: https://github.com/TRI-ML/vlm-evaluation/issues/16.
    """
    width, height = record.image_size
    picture = Frame(left=0, top=0, width=width, height=height)
    frame = _frame(record, box_spec)
    x1, x2 = (frame.left + value * frame.width for value in box[0::2])
    y1, y2 = (frame.top + value * frame.height for value in box[1::2])
    left, top, right, bottom = _to_fractions((x1, y1, x2, y2), picture)
    answer = (max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0))
    x1, y1, x2, y2 = (round(value, 2) for value in _to_fractions(question.box, picture))
    return intersection_over_union(answer, (x1, y1, x2, y2))


def _frame(record: Record, box_spec: BoxSpec) -> Frame:
    width, height = record.image_size
    return ImageGeometry(width=width, height=height).box_frame(box_spec)


def _to_fractions(box: Box, frame: Frame) -> Box:
    x1, x2 = ((value - frame.left) / frame.width for value in box[0::2])
    y1, y2 = ((value - frame.top) / frame.height for value in box[1::2])
    return x1, y1, x2, y2


def _with_last_pixel(box: Box) -> Box:
    return box[0], box[1], box[2] + 1, box[3] + 1


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                name="unpad",
                summary="IoU > 0.5 in pixels of the picture: padding taken off, corners put in "
                "order, clipped to the picture",
                source="gap-export",
                read=_fractions,
                compare=_in_pixels,
                reaches=operator.gt,
            ),
            Protocol(
                name="lmms",
                summary="IoU >= 0.5 in fractions of the picture, padding not taken off: answers "
                "about a padded square are under-counted; only [x1, y1, x2, y2] is read",
                source="lmms-eval, tasks/refcoco/utils_rec.py",
                syntaxes=("bracketed",),
                read=_first_four_floats,
                compare=_as_fractions_of_the_picture,
                reaches=operator.ge,
            ),
            Protocol(
                name="shikra",
                summary="IoU > 0.5 in the model's own frame, the true box in three decimals",
                source="Shikra, single_image_dataset/rec.py",
                families=("shikra",),
                read=_fractions,
                compare=_in_the_model_s_frame,
                reaches=operator.gt,
            ),
            Protocol(
                name="minigpt-v2",
                summary="IoU > 0.5 in pixels of the picture, both ends counted (+1 px), padding "
                "not taken off",
                source="MiniGPT-4, eval_scripts/eval_ref.py and common/eval_utils.py",
                families=("minigpt_v2",),
                read=_fractions,
                compare=_in_pixels_with_both_ends,
                reaches=operator.gt,
            ),
            Protocol(
                name="vlm-evaluation",
                summary="IoU >= 0.5 in fractions of the picture, the true box in two decimals; "
                "padding taken off, which its own program leaves on",
                source="vlm-evaluation, tasks/harnesses/refcoco.py",
                read=_fractions,
                compare=_in_hundredths_of_the_picture,
                reaches=operator.ge,
            ),
        )
    }
)
