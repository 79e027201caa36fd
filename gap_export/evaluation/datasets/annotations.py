"""From what the layouts read to a data set: boxes checked, images together, cut to so many."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from gap_export.errors import UsageError
from gap_export.evaluation.questions import (
    AbsentQuestion,
    Asked,
    Dataset,
    ImageSource,
    Question,
    Unusable,
    UnusableReason,
)
from gap_export.parity.metrics import Box

# COCO's own boxes reach over the border by what rounding does.
BORDER_SLACK = 1.0
# A thousand times what RefCOCO has; a file made to use up memory has more.
MAX_EXPRESSIONS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Annotation(Asked):
    """One expression as it is stored: its types are checked and its values are not.

    Attributes:
        image: None where the image is missing.
        image_name: What a missing image is called.
    """

    image: ImageSource | None
    image_name: str


def assemble(
    annotations: Iterable[Annotation],
    *,
    spec: str,
    name: str,
    layout: str,
    splits: Sequence[str],
    samples: int | None,
    looked_in: str,
) -> Dataset:
    """Make a data set of annotations.

    Those about one image are brought together, in the order in which the images appear in a
    split; then the first so many of each split are taken.

    Args:
        annotations: Split after split.
        spec: How the user named the data set.
        name: Name of the data set.
        layout: How it is stored.
        splits: Those that the annotations are from.
        samples: How many of each split; None for all.
        looked_in: Where images were looked for, for the message when there are none.

    Raises:
        UsageError: no expression can be asked, two have the same id, or there are too many.
    """
    by_split: dict[str, dict[str, list[Annotation]]] = {}
    for number, one in enumerate(annotations):
        if number == MAX_EXPRESSIONS:
            raise UsageError(
                "the data set has too many expressions", allowed=f"at most {MAX_EXPRESSIONS:,}"
            )
        by_split.setdefault(one.split, {}).setdefault(one.image_id, []).append(one)
    chosen: list[Annotation] = []
    for groups in by_split.values():
        chosen += [one for group in groups.values() for one in group][:samples]
    _check_ids(chosen)
    questions: list[Question] = []
    absent: list[AbsentQuestion] = []
    unusable: list[Unusable] = []
    # Rows of one image may hold a copy of it each: one of them is enough.
    images: dict[str, ImageSource] = {}
    for one in chosen:
        if one.image is not None:
            images.setdefault(one.image_id, one.image)
        made = _judge(one, images.get(one.image_id))
        if isinstance(made, Question):
            questions.append(made)
        elif isinstance(made, AbsentQuestion):
            absent.append(made)
        else:
            unusable.append(made)
    if not questions:
        raise _nothing_to_ask(spec, unusable, looked_in, num_absent=len(absent))
    # What cannot be asked is part of it: it is in the denominator.
    digest = hashlib.sha256()
    all_asked: list[Asked] = [*questions, *absent]
    for asked in all_asked:
        said = [asked.id, asked.image_id, asked.split, asked.kind, asked.expression]
        digest.update(json.dumps([*said, *(asked.box or ())]).encode() + b"\n")
    for other in unusable:
        digest.update(json.dumps([other.question_id, other.reason]).encode() + b"\n")
    return Dataset(
        spec=spec,
        name=name,
        splits=tuple(splits),
        layout=layout,
        fingerprint=digest.hexdigest(),
        questions=tuple(questions),
        unusable=tuple(unusable),
        absent=tuple(absent),
    )


def check_box(box: Box, image_size: tuple[int, int] | None) -> Box | UnusableReason:
    """A box cut at the image's border, or what is wrong with it.

    Args:
        box: (x1, y1, x2, y2) in pixels, finite.
        image_size: Width and height in pixels; None where they are unknown, and then only what is
            left of or above the image is found.
    """
    if box[2] <= box[0] or box[3] <= box[1]:
        return "empty box"
    width, height = (float("inf"), float("inf")) if image_size is None else image_size
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(width), box[2]), min(float(height), box[3])
    cut = max(left - box[0], top - box[1], box[2] - right, box[3] - bottom)
    if cut > BORDER_SLACK or right <= left or bottom <= top:
        return "box outside the picture"
    return left, top, right, bottom


def _check_ids(annotations: Sequence[Annotation]) -> None:
    counts = Counter(one.id for one in annotations)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise UsageError(
            "expressions of the data set have the same id",
            seen=f"{', '.join(twice[:5])}{', ...' if len(twice) > 5 else ''}",
            allowed="one expression for each id",
        )


def _judge(one: Annotation, image: ImageSource | None) -> Question | AbsentQuestion | Unusable:
    """A question, or why there is none. What is wrong with the annotation goes first."""
    checked = None if one.box is None else check_box(one.box, one.image_size)
    reason: UnusableReason
    if one.box is not None and isinstance(checked, str):
        size = "" if one.image_size is None else f", image {one.image_size[0]}x{one.image_size[1]}"
        reason, detail = checked, f"box {', '.join(f'{edge:g}' for edge in one.box)}{size}"
    elif not one.expression.strip():
        reason, detail = "empty expression", repr(one.expression[:20])
    elif image is None:
        reason, detail = "missing picture", one.image_name
    else:
        annotated = {field.name: getattr(one, field.name) for field in fields(Asked)}
        if checked is None:
            return AbsentQuestion(**annotated, image=image)
        return Question(**{**annotated, "box": checked}, image=image)
    return Unusable.of(one, reason, detail)


def _nothing_to_ask(
    spec: str, unusable: Sequence[Unusable], looked_in: str, *, num_absent: int
) -> UsageError:
    if num_absent:
        return UsageError(
            "no expression of the data set has an object that is there and can be asked about",
            seen=f"{num_absent} expressions without a box, {len(unusable)} that cannot be asked",
            allowed="expressions with a box, and any number without",
        )
    if not unusable:
        return UsageError("the data set has no expressions", seen=spec)
    counts = Counter(one.reason for one in unusable)
    missing = [one.detail for one in unusable if one.reason == "missing picture"]
    return UsageError(
        "none of the data set's expressions can be asked",
        seen=", ".join(f"{count} with {reason}" for reason, count in counts.most_common()),
        fix=f"put the images, such as {missing[0]}, into one of: {looked_in}"
        if missing
        else f"the first is {unusable[0].question_id}: {unusable[0].detail}",
    )
