"""RefShapes as a data set: nothing is stored, every scene is drawn again from its number."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.annotations import Annotation, assemble
from gap_export.evaluation.questions import Dataset, ImageSource
from gap_export.evaluation.refshapes import (
    EXPRESSIONS_PER_IMAGE,
    IMAGE_SIZE,
    Sample,
    Split,
    absent_expressions,
    iter_samples,
)

NAME = "refshapes"
SPLITS: tuple[Split, ...] = ("heldout", "train")
# Of one scene there are not many more.
MAX_ABSENT_SHARE = 0.8


def open_refshapes(
    spec: str, split: str | None, *, samples: int | None, seed: int, absent: float = 0.0
) -> Dataset:
    """The first expressions of a split, by default of what is held out; it has no end.

    Args:
        spec: How the user named it.
        split: Which; None for the default.
        samples: How many expressions that have an object.
        seed: Seed of the scenes.
        absent: Share in all that is asked of expressions whose object is not there; they come on
            top of ``samples``.

    Raises:
        UsageError: no such split, or no number.
    """
    chosen = [name for name in SPLITS if name == (split or SPLITS[0])]
    if not chosen:
        raise UsageError(f"{NAME} has no such split", seen=repr(split), allowed=", ".join(SPLITS))
    if samples is None:
        raise UsageError(
            f"{NAME} has no end: all of its expressions cannot be asked",
            fix="say how many",
        )
    return assemble(
        _annotations(chosen[0], samples, seed, absent),
        spec=spec,
        name=NAME,
        layout=NAME,
        splits=chosen,
        samples=None,
        looked_in="nowhere: they are drawn",
    )


def _annotations(split: Split, samples: int, seed: int, absent: float) -> Iterator[Annotation]:
    """Scene by scene what is there, and of what is not so many that the share holds so far."""
    per_present = absent / (1.0 - absent)
    num_present = num_absent = 0
    for _, group in groupby(
        iter_samples(split=split, seed=seed, num_samples=samples), key=lambda one: one.scene.index
    ):
        of_scene = list(group)
        scene = of_scene[0].scene
        for sample in of_scene:
            place = scene.expressions.index(sample.expression)
            yield _annotation(
                sample, str(place), sample.expression.text, sample.expression.kind, sample.box
            )
        num_present += len(of_scene)
        wanted = round(num_present * per_present) - num_absent
        for place, one in enumerate(absent_expressions(scene, wanted) if wanted > 0 else ()):
            num_absent += 1
            yield _annotation(of_scene[0], f"absent-{place}", one.text, one.kind, None)


def _annotation(
    sample: Sample, place: str, text: str, kind: str, box: tuple[int, int, int, int] | None
) -> Annotation:
    scene = sample.scene
    image_id = f"{scene.split}-{scene.seed}-{scene.index}"
    return Annotation(
        id=f"{image_id}-{place}",
        image_id=image_id,
        image=ImageSource(scene=(scene.split, scene.seed, scene.index, EXPRESSIONS_PER_IMAGE)),
        image_name=image_id,
        expression=text,
        box=None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        image_size=(IMAGE_SIZE, IMAGE_SIZE),
        kind=kind,
        split=scene.split,
    )
