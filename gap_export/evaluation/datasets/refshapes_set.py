"""RefShapes as a data set: nothing is stored, every scene is drawn again from its number."""

from __future__ import annotations

from collections.abc import Iterator

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.annotations import Annotation, assemble
from gap_export.evaluation.questions import Dataset, ImageSource
from gap_export.evaluation.refshapes import (
    EXPRESSIONS_PER_IMAGE,
    IMAGE_SIZE,
    Split,
    iter_samples,
)

NAME = "refshapes"
SPLITS: tuple[Split, ...] = ("heldout", "train")


def open_refshapes(spec: str, split: str | None, *, samples: int | None, seed: int) -> Dataset:
    """The first expressions of a split, by default of what is held out; it has no end.

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
        _annotations(chosen[0], samples, seed),
        spec=spec,
        name=NAME,
        layout=NAME,
        splits=chosen,
        samples=samples,
        looked_in="nowhere: they are drawn",
    )


def _annotations(split: Split, samples: int, seed: int) -> Iterator[Annotation]:
    for sample in iter_samples(split=split, seed=seed, num_samples=samples):
        scene, expression = sample.scene, sample.expression
        image_id = f"{split}-{seed}-{scene.index}"
        left, top, right, bottom = sample.box
        yield Annotation(
            id=f"{image_id}-{scene.expressions.index(expression)}",
            image_id=image_id,
            image=ImageSource(scene=(split, seed, scene.index, EXPRESSIONS_PER_IMAGE)),
            image_name=image_id,
            expression=expression.text,
            box=(float(left), float(top), float(right), float(bottom)),
            image_size=(IMAGE_SIZE, IMAGE_SIZE),
            kind=expression.kind,
            split=split,
        )
