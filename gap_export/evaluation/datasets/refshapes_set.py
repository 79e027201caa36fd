"""RefShapes as a data set: nothing is stored, every scene is drawn again from its number."""

from __future__ import annotations

from collections.abc import Iterator

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.annotations import Annotation, assemble
from gap_export.evaluation.questions import Dataset, ImageSource
from gap_export.evaluation.refshapes import IMAGE_SIZE, Split, generate_scene

NAME = "refshapes"
SPLITS: tuple[Split, ...] = ("heldout", "train")
_EXPRESSIONS_PER_IMAGE = 4


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
    index = asked = 0
    while asked < samples:
        source = (split, seed, index, _EXPRESSIONS_PER_IMAGE)
        scene = generate_scene(
            split=split, seed=seed, index=index, num_expressions=_EXPRESSIONS_PER_IMAGE
        )
        image_id = f"{split}-{seed}-{index}"
        for number, expression in enumerate(scene.expressions[: samples - asked]):
            left, top, right, bottom = scene.objects[expression.target].box
            yield Annotation(
                id=f"{image_id}-{number}",
                image_id=image_id,
                image=ImageSource(scene=source),
                image_name=image_id,
                expression=expression.text,
                box=(float(left), float(top), float(right), float(bottom)),
                image_size=(IMAGE_SIZE, IMAGE_SIZE),
                kind=expression.kind,
                split=split,
            )
            asked += 1
        index += 1
