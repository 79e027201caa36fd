"""RefShapes and RefShapes-2 as data sets: every scene is drawn again from its number."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.annotations import Annotation, assemble
from gap_export.evaluation.drawn import GENERATORS, AnyScene, DrawnName
from gap_export.evaluation.questions import Dataset, ImageSource
from gap_export.evaluation.refshapes import (
    EXPRESSIONS_PER_IMAGE,
    Split,
)

NAME: DrawnName = "refshapes"
SPLITS: tuple[Split, ...] = ("heldout", "train")
# Of one scene there are not many more.
MAX_ABSENT_SHARE = 0.8
# Scenes of two sets have the same numbers.
_ID_PREFIXES: dict[DrawnName, str] = {"refshapes": "", "refshapes-2": "2-"}


def open_drawn(
    name: DrawnName,
    spec: str,
    split: str | None,
    *,
    samples: int | None,
    seed: int,
    absent: float = 0.0,
) -> Dataset:
    """The first expressions of a split, by default of what is held out; it has no end.

    Args:
        name: Which of the two.
        spec: How the user named it.
        split: Which; None for the default.
        samples: How many expressions that have an object.
        seed: Seed of the scenes.
        absent: Share in all that is asked of expressions whose object is not there;
            they come on top of ``samples``.

    Raises:
        UsageError: no such split, or no number.
    """
    chosen = [one for one in SPLITS if one == (split or SPLITS[0])]
    if not chosen:
        raise UsageError(f"{name} has no such split", seen=repr(split), allowed=", ".join(SPLITS))
    if samples is None:
        raise UsageError(
            f"{name} has no end: all of its expressions cannot be asked",
            fix="say how many",
        )
    return assemble(
        _annotations(name, chosen[0], samples, seed, absent),
        spec=spec,
        name=name,
        layout=name,
        splits=chosen,
        samples=None,
        looked_in="nowhere: they are drawn",
    )


def _annotations(
    name: DrawnName, split: Split, samples: int, seed: int, absent: float
) -> Iterator[Annotation]:
    """Scene by scene what is there, and of what is not so many that the share holds so far."""
    per_present = absent / (1.0 - absent)
    num_present = num_absent = 0
    generator = GENERATORS[name]
    for index in count():
        if num_present == samples:
            return
        scene = generator.scene(
            split=split, seed=seed, index=index, num_expressions=EXPRESSIONS_PER_IMAGE
        )
        present = scene.expressions[: samples - num_present]
        for place, one in enumerate(present):
            box = scene.objects[one.target].box
            yield _annotation(name, scene, str(place), one.text, one.kind, box)
        num_present += len(present)
        wanted = round(num_present * per_present) - num_absent
        for place, other in enumerate(generator.absent(scene, wanted) if wanted > 0 else ()):
            num_absent += 1
            yield _annotation(name, scene, f"absent-{place}", other.text, other.kind, None)


def _annotation(
    name: DrawnName,
    scene: AnyScene,
    place: str,
    text: str,
    kind: str,
    box: tuple[int, int, int, int] | None,
) -> Annotation:
    image_id = f"{_ID_PREFIXES[name]}{scene.split}-{scene.seed}-{scene.index}"
    height, width = scene.image.shape[:2]
    number = scene.split, scene.seed, scene.index, EXPRESSIONS_PER_IMAGE
    return Annotation(
        id=f"{image_id}-{place}",
        image_id=image_id,
        image=ImageSource(scene=number, generator=name),
        image_name=image_id,
        expression=text,
        box=None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        image_size=(width, height),
        kind=kind,
        split=scene.split,
    )
