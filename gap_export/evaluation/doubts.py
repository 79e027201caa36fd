"""Warnings about a measurement: answers that are probably not meant the way they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from gap_export.evaluation.records import Record
from gap_export.runtime.answers import SCALE_TOLERANCE, is_out_of_scale
from gap_export.spec.manifest import BoxSpec

# Share of the answers out of scale that another scale must explain before it is named.
_MOST = 0.9
# Ends of both axes; None: those of the image. The model's own scale is none of them.
_SCALES: Mapping[str, float | None] = MappingProxyType(
    {"fractions (0..1)": 1.0, "percent (0..100)": 100.0, "0..1000": 1000.0, "pixels": None}
)


def is_record_out_of_scale(record: Record, spec: BoxSpec) -> bool:
    """Whether an answer holds a box that is written on another scale than the model's."""
    return record.fractions is not None and is_out_of_scale(record.fractions, spec)


def find_doubts(records: Sequence[Record], spec: BoxSpec, *, accuracy: float) -> tuple[str, ...]:
    """What makes the measurement doubtful; empty where nothing does.

    Args:
        records: Answers of the unpruned model.
        spec: How the model writes boxes.
        accuracy: Acc@0.5 of these answers, in 0..1.
    """
    given = [record for record in records if record.error is None]
    out = [record for record in given if is_record_out_of_scale(record, spec)]
    doubts = []
    if 2 * len(out) > len(given):
        guess = guess_scale(out, spec)
        looks = f"look like {guess}" if guess else f"do not run from 0 {spec.describe_ends()}"
        doubts.append(
            f"unpruned, out of scale: {len(out)} of {len(given)}; the answers {looks}: check the "
            "recipe's box.scale"
        )
    if accuracy == 0:
        doubts.append(
            f"unpruned, Acc@0.5 is 0.0 %: none of {len(records)} answers is right, so there is "
            "nothing that pruning could cost; check the recipe's box and prompt, --data and "
            "--protocol"
        )
    return tuple(doubts)


def guess_scale(records: Sequence[Record], spec: BoxSpec) -> str:
    """The scale that nearly all answers fit, and of several the one with the least room.

    Args:
        records: Answers with a box, each out of scale.
        spec: How the model writes boxes.

    Returns:
        In words; empty where none fits.
    """
    room: dict[str, float] = {}
    for name, end in _SCALES.items():
        sizes = [record.image_size if end is None else (end, end) for record in records]
        fits = [_fits(record, spec, size) for record, size in zip(records, sizes, strict=True)]
        if end != spec.scale and sum(fits) >= _MOST * len(records):
            room[name] = sum(width * height for width, height in sizes)
    return min(room, key=lambda name: room[name], default="")


def _fits(record: Record, spec: BoxSpec, size: tuple[float, float]) -> bool:
    assert record.fractions is not None, "an answer out of scale holds a box"
    x1, y1, x2, y2 = (
        value * end for value, end in zip(record.fractions, spec.ends * 2, strict=True)
    )
    most = 1 + SCALE_TOLERANCE
    return (
        min(x1, y1, x2, y2) >= 0
        and max(x1, x2) <= most * size[0]
        and (max(y1, y2) <= most * size[1])
    )
