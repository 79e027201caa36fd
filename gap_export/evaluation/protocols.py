"""When an answer is right: the conventions that published numbers follow, each under its name.

They differ in which texts are read, in the frame in which two boxes are compared, in how the true
box is rounded, and in whether an IoU of exactly the threshold hits. Numbers are comparable under
one protocol only. What is the same in all: an answer that is not read has IoU 0 and counts as
wrong; and an image has the size it was loaded with.

Under the name of a program an answer is read as that program reads it, so what counts as wrong
there does so here. Under ``tolerant`` it is read as ``ground`` does, with
``runtime.boxes.parse_answer``, and under ``unpad`` in the model's own syntax alone.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from gap_export.errors import UsageError
from gap_export.evaluation.questions import Question
from gap_export.evaluation.records import Record
from gap_export.parity.metrics import Box, intersection_over_union
from gap_export.runtime.boxes import parse_box
from gap_export.runtime.images.geometry import Frame, ImageGeometry
from gap_export.spec.manifest import BoxSpec

__all__ = ["NATIVE", "PROTOCOLS", "Protocol", "applicable", "resolve_protocol"]

NATIVE = "native"
_OURS = "tolerant"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One convention.

    Attributes:
        summary: One line for reports.
        source: The program that it is the convention of.
        syntaxes: Ways to write a box that its program reads.
        scale: The only scale that its program knows; None where any will do.
        read: An answer's box as the protocol takes it, in 0..1 of the model's frame; None where it
            finds none, which is wrong.
        compare: IoU of what was read with the true box.
        reaches: Whether an IoU hits at a threshold.
    """

    name: str
    summary: str
    source: str
    syntaxes: tuple[str, ...] = ("bracketed", "angled", "corners")
    scale: float | None = None
    read: Callable[[Record, BoxSpec], Box | None]
    compare: Callable[[Box, Record, Question, BoxSpec], float]
    reaches: Callable[[float, float], bool]

    def iou(self, record: Record, question: Question, box_spec: BoxSpec) -> float:
        """IoU of an answer with the true box, in 0..1; 0 where no box is read.

        ``box_spec`` says how the model that answered writes boxes.
        """
        box = self.read(record, box_spec)
        return 0.0 if box is None else self.compare(box, record, question, box_spec)

    def reads_boxes_of(self, box_spec: BoxSpec) -> bool:
        """Whether its program reads boxes written so."""
        return box_spec.syntax in self.syntaxes and self.scale in (None, box_spec.scale)

    def is_hit(self, iou: float, threshold: float = 0.5) -> bool:
        """Whether an IoU counts as right."""
        return self.reaches(iou, threshold)


def resolve_protocol(name: str, native: str | None, box_spec: BoxSpec) -> Protocol:
    """The protocol of a name.

    Args:
        name: One of ``PROTOCOLS``, or ``native``.
        native: What ``native`` stands for: the model's family declares the name of its authors' own
            program. None where they publish none; then it is ``tolerant``.
        box_spec: How the model writes boxes.

    Raises:
        UsageError: no protocol of that name, or one that does not read the model's boxes.
    """
    chosen = (native or _OURS) if name == NATIVE else name
    if chosen not in PROTOCOLS:
        raise UsageError(
            "there is no such protocol", seen=repr(name), allowed=", ".join([NATIVE, *PROTOCOLS])
        )
    protocol = PROTOCOLS[chosen]
    if not protocol.reads_boxes_of(box_spec):
        raise UsageError(
            "the protocol does not read this model's boxes, so every answer would be wrong",
            seen=f"{chosen}, and boxes that are {box_spec.syntax}, from 0 "
            f"{box_spec.describe_ends()}",
            allowed=", ".join(one.name for one in applicable(box_spec)),
        )
    return protocol


def applicable(box_spec: BoxSpec) -> tuple[Protocol, ...]:
    """The protocols that read boxes written so."""
    return tuple(one for one in PROTOCOLS.values() if one.reads_boxes_of(box_spec))


# Floats in square brackets. Stricter than our own reading: no plus sign, no ".5", no space before a
# comma, and nothing is divided by the model's scale.
_FLOAT = r"(-?\d+(?:\.\d+)?)"
_FLOATS = re.compile(r"\[\s*" + r",\s*".join([_FLOAT] * 4) + r"\s*\]")


def _first_four_floats(record: Record, _: BoxSpec) -> Box | None:
    found = _FLOATS.search(record.text)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in found.groups())
    # Hundreds of digits make infinity, of which no area can be had.
    return (x1, y1, x2, y2) if math.isfinite(x1 + y1 + x2 + y2) else None


# One digit before the point, no sign, no space; several boxes may share a pair of brackets.
_SHIKRA_BOX = ",".join([r"\d(?:\.\d*)?"] * 4)
_SHIKRA_BOXES = re.compile(rf"\[{_SHIKRA_BOX}(?:;{_SHIKRA_BOX})*\]")


def _the_only_box(record: Record, _: BoxSpec) -> Box | None:
    """Shikra's program reads an answer that holds one box, wherever, and no other."""
    # It decodes with clean_up_tokenization_spaces, which closes these gaps.
    text = record.text.replace(" .", ".").replace(" ,", ",")
    found = _SHIKRA_BOXES.findall(text)
    if len(found) != 1 or ";" in found[0]:
        return None
    x1, y1, x2, y2 = (float(number) for number in found[0][1:-1].split(","))
    return x1, y1, x2, y2


_MINIGPT_BOX = re.compile(r"\{" + r"<\d{1,3}>" * 4 + r"\}")


def _box_at_the_beginning(record: Record, _: BoxSpec) -> Box | None:
    """MiniGPT-v2's program reads a box that an answer begins with, and no number behind it.

    Its box is in hundredths, independent of the recipe.
    """
    text = record.text.split("[/INST]")[-1].replace("<unk>", "").replace(" ", "").strip()
    numbers = re.findall(r"\d+", text)
    if _MINIGPT_BOX.match(text) is None or len(numbers) != 4:
        return None
    x1, y1, x2, y2 = (int(number) / 100 for number in numbers)
    return x1, y1, x2, y2


# A list of numbers as Python writes them, and nothing else.
# 01 is no number of Python's, 01.5 is.
_PYTHON_FLOAT = r"[+-]?(?!0+[1-9]\d*\s*[,\]])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_PYTHON_LIST = re.compile(
    r"\s*\[\s*" + r"\s*,\s*".join([f"({_PYTHON_FLOAT})"] * 4) + r"\s*,?\s*\]\s*", re.ASCII
)


def _the_whole_answer(record: Record, _: BoxSpec) -> Box | None:
    """vlm-evaluation reads an answer that is a list, in 0..1, of corners in order."""
    found = _PYTHON_LIST.fullmatch(record.text)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in found.groups())
    is_box = 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
    return (x1, y1, x2, y2) if is_box else None


# From the first bracket on, whatever stands there: what are no four numbers is a wrong answer.
_IN_BRACKETS = re.compile(r"\[([^,\n]*),([^,\n]*),([^,\n]*),([^\]\n]*)\]")


def _the_first_list(record: Record, _: BoxSpec) -> Box | None:
    """InternVL's program reads what the first bracket opens, in thousandths or in fractions.

    Numbers that add up to less than 4 are fractions to it.
    """
    found = _IN_BRACKETS.search(record.text)
    try:
        numbers = [float(part.lstrip("[")) for part in found.groups()] if found else []
    except ValueError:
        return None
    if len(numbers) != 4 or not math.isfinite(sum(numbers)):
        return None
    unit = 1000.0 if sum(numbers) >= 4 else 1.0
    x1, y1, x2, y2 = (number / unit for number in numbers)
    return x1, y1, x2, y2


def _in_pixels(_: Box, record: Record, question: Question, __: BoxSpec) -> float:
    """What the runtime answers, in pixels of the image: corners in order, clipped."""
    return 0.0 if record.box is None else intersection_over_union(record.box, question.box)


def _as_fractions_of_the_image(box: Box, record: Record, question: Question, _: BoxSpec) -> float:
    """The answer as it stands, though it may refer to the padded square."""
    width, height = record.image_size
    image = Frame(left=0, top=0, width=width, height=height)
    return intersection_over_union(box, _to_fractions(question.box, image))


def _in_model_frame(box: Box, record: Record, question: Question, box_spec: BoxSpec) -> float:
    """The truth as the model would write it, clipped to its frame and in three decimals."""
    fractions = _to_fractions(question.box, _frame(record, box_spec))
    truth = [round(min(max(value, 0.0), 1.0), 3) for value in fractions]
    # Thousandths in float32 decide what is a half; areas have the corners' signs.
    one, other = (np.array(values, np.float32) * np.float32(1000) for values in (box, truth))
    width, height = np.maximum(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0)
    overlap = width * height
    areas = [(it[2] - it[0]) * (it[3] - it[1]) for it in (one, other)]
    union = areas[0] + areas[1] - overlap
    return min(float(overlap / union), 1.0) if overlap > 0 else 0.0


def _in_pixels_with_both_ends(box: Box, record: Record, question: Question, _: BoxSpec) -> float:
    """Coordinates are taken for indices of pixels, and both ends belong to the box."""
    width, height = record.image_size
    x1, y1, x2, y2 = box
    left, top, right, bottom = question.box
    answer = (x1 * width, y1 * height, x2 * width + 1, y2 * height + 1)
    return intersection_over_union(answer, (left, top, right + 1, bottom + 1))


def _in_hundredths_of_the_image(
    box: Box, record: Record, question: Question, box_spec: BoxSpec
) -> float:
    """The answer without its padding, clipped to the image; the truth in two decimals.

    Its own program compares answers about a padded square as they stand, and refuses those beyond
    0..1: https://github.com/TRI-ML/vlm-evaluation/issues/16.
    """
    width, height = record.image_size
    image = Frame(left=0, top=0, width=width, height=height)
    frame = _frame(record, box_spec)
    x1, x2 = (frame.left + value * frame.width for value in box[0::2])
    y1, y2 = (frame.top + value * frame.height for value in box[1::2])
    left, top, right, bottom = _to_fractions((x1, y1, x2, y2), image)
    answer = (max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0))
    x1, y1, x2, y2 = (round(value, 2) for value in _to_fractions(question.box, image))
    return intersection_over_union(answer, (x1, y1, x2, y2))


def _frame(record: Record, box_spec: BoxSpec) -> Frame:
    width, height = record.image_size
    return ImageGeometry(width=width, height=height).box_frame(box_spec)


def _to_fractions(box: Box, frame: Frame) -> Box:
    x1, x2 = ((value - frame.left) / frame.width for value in box[0::2])
    y1, y2 = ((value - frame.top) / frame.height for value in box[1::2])
    return x1, y1, x2, y2


_IN_PIXELS = (
    "IoU > 0.5 in pixels of the image: padding taken off, corners put in order, clipped to the "
    "image"
)
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                name=_OURS,
                summary=f"{_IN_PIXELS}; answers are read with tolerance, as gap-export ground does",
                source="gap-export",
                read=lambda record, _: record.fractions,
                compare=_in_pixels,
                reaches=operator.gt,
            ),
            Protocol(
                name="unpad",
                summary=f"{_IN_PIXELS}; only boxes in the model's own syntax are read",
                source="gap-export",
                read=lambda record, box_spec: parse_box(record.text, box_spec),
                compare=_in_pixels,
                reaches=operator.gt,
            ),
            Protocol(
                name="lmms",
                summary="IoU >= 0.5 in fractions of the image, padding not taken off: answers "
                "about a padded square are under-counted; only [x1, y1, x2, y2] is read",
                source="lmms-eval, tasks/refcoco/utils_rec.py",
                syntaxes=("bracketed",),
                scale=1.0,
                read=_first_four_floats,
                compare=_as_fractions_of_the_image,
                reaches=operator.ge,
            ),
            Protocol(
                name="shikra",
                summary="IoU > 0.5 in the model's own frame, the true box in three decimals; only "
                "answers with one box, [0.1,0.2,0.3,0.4] without spaces, are read",
                source="Shikra, single_image_dataset/rec.py and box_process_function.py",
                syntaxes=("bracketed",),
                scale=1.0,
                read=_the_only_box,
                compare=_in_model_frame,
                reaches=operator.gt,
            ),
            Protocol(
                name="minigpt-v2",
                summary="IoU > 0.5 in pixels of the image, both ends counted (+1 px), padding "
                "not taken off; only answers that begin with {<10><20><30><40>}, and hold no other "
                "number, are read",
                source="MiniGPT-4, eval_scripts/eval_ref.py and common/eval_utils.py",
                syntaxes=("angled",),
                read=_box_at_the_beginning,
                compare=_in_pixels_with_both_ends,
                reaches=operator.gt,
            ),
            Protocol(
                name="vlm-evaluation",
                summary="IoU >= 0.5 in fractions of the image, the true box in two decimals; "
                "padding taken off, which its own program leaves on; only answers that are "
                "[x1, y1, x2, y2] and nothing else, in 0..1 and corners in order, are read",
                source="vlm-evaluation, tasks/harnesses/refcoco.py",
                syntaxes=("bracketed",),
                scale=1.0,
                read=_the_whole_answer,
                compare=_in_hundredths_of_the_image,
                reaches=operator.ge,
            ),
            Protocol(
                name="internvl",
                summary="IoU >= 0.5 in fractions of the image, corners as they are, nothing "
                "clipped; what the first bracket of an answer opens is read, in thousandths, or as "
                "fractions where the four numbers add up to less than 4",
                source="InternVL, internvl_chat/eval/refcoco/evaluate_grounding.py",
                syntaxes=("bracketed",),
                scale=1000.0,
                read=_the_first_list,
                compare=_as_fractions_of_the_image,
                reaches=operator.ge,
            ),
        )
    }
)
