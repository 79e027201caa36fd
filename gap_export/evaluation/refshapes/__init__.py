"""RefShapes: a synthetic referring-expression set, rendered on the fly and fully determined.

A scene is a function of (split, seed, index) and of nothing else. The split is part of the
random generator's key, so no held-out scene can be met in training, with any seed.

Example:
    >>> scene = generate_scene(split="heldout", seed=0, index=7)
    >>> scene.image.shape, scene.image.dtype.name
    ((96, 96, 3), 'uint8')
    >>> for sample in iter_samples(seed=0, num_samples=2000):
    ...     sample.image, sample.expression, sample.box  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes.absent import AbsentExpression, sample_absent
from gap_export.evaluation.refshapes.expressions import (
    WORDS,
    Expression,
    Kind,
    sample_expressions,
)
from gap_export.evaluation.refshapes.objects import (
    COLORS,
    GRID_SIZE,
    IMAGE_SIZE,
    PATCH_SIZE,
    SHAPES,
    SIZES,
    SceneObject,
    sample_objects,
)
from gap_export.evaluation.refshapes.render import render
from gap_export.evaluation.refshapes.scene_number import (
    EXPRESSIONS_PER_IMAGE,
    MIN_EXPRESSIONS,
    Split,
    check_number,
)

__all__ = [
    "COLORS",
    "EXPRESSIONS_PER_IMAGE",
    "GRID_SIZE",
    "IMAGE_SIZE",
    "PATCH_SIZE",
    "SHAPES",
    "SIZES",
    "WORDS",
    "AbsentExpression",
    "Expression",
    "Kind",
    "Sample",
    "Scene",
    "SceneObject",
    "Split",
    "absent_expressions",
    "calibration_questions",
    "generate_scene",
    "iter_samples",
]

_SPLIT_KEYS: dict[str, int] = {"train": 1, "heldout": 2}
# The random generator's key of what is not there: scenes are the same with and without.
_ABSENT_KEY = 3
# Enough for the mean size of every channel; AWQ's authors take as few.
_NUM_CALIBRATION_IMAGES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A rendered scene and the expressions that can be asked about it.

    Attributes:
        image: uint8 [96, 96, 3], RGB.
        expressions: Different, unambiguous expressions.
        object_map: int64 [12, 12], index of the object that covers most of a patch, or -1.
        index: Index within split and seed.
    """

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    expressions: tuple[Expression, ...]
    object_map: NDArray[np.int64]
    split: Split
    seed: int
    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One question with its answer."""

    scene: Scene
    expression: Expression

    @property
    def image(self) -> NDArray[np.uint8]:
        """The image, uint8 [96, 96, 3]."""
        return self.scene.image

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The answer (x1, y1, x2, y2) in pixels."""
        return self.scene.objects[self.expression.target].box


def generate_scene(*, split: Split, seed: int, index: int, num_expressions: int = 8) -> Scene:
    """Build scene number `index`; the same arguments always give the same bytes.

    Args:
        split: "train" or "heldout".
        seed: Non-negative seed.
        index: Non-negative number of the scene.
        num_expressions: How many expressions to look for, at least 1. Scenes for which fewer
            than min(4, num_expressions) are found are drawn again.

    Returns:
        The scene, with at most `num_expressions` expressions.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_number(split, seed, index, num_expressions)
    rng = np.random.default_rng([_SPLIT_KEYS[split], seed, index])
    while True:
        objects = sample_objects(rng, split)
        expressions = sample_expressions(rng, objects, num_expressions)
        if len(expressions) >= min(MIN_EXPRESSIONS, num_expressions):
            break
    image, object_map = render(rng, objects)
    return Scene(
        image=image,
        objects=objects,
        expressions=expressions,
        object_map=object_map,
        split=split,
        seed=seed,
        index=index,
    )


def iter_samples(*, seed: int, num_samples: int, split: Split = "heldout") -> Iterator[Sample]:
    """Yield questions, image by image; those about one image are all different.

    Args:
        seed: Seed of the scenes.
        num_samples: How many questions to yield.
        split: "heldout", or "train".

    Yields:
        Exactly `num_samples` samples, at most `EXPRESSIONS_PER_IMAGE` about one image.
    """
    index = yielded = 0
    while yielded < num_samples:
        scene = generate_scene(
            split=split, seed=seed, index=index, num_expressions=EXPRESSIONS_PER_IMAGE
        )
        index += 1
        for expression in scene.expressions[: num_samples - yielded]:
            yield Sample(scene=scene, expression=expression)
            yielded += 1


def absent_expressions(scene: Scene, count: int) -> tuple[AbsentExpression, ...]:
    """Expressions that no object of a scene answers to, at most `count`.

    They are a function of the scene and of `count` and of nothing else; those of a held-out scene
    are held out with it.
    """
    key = [_SPLIT_KEYS[scene.split], scene.seed, scene.index, _ABSENT_KEY]
    return sample_absent(np.random.default_rng(key), scene.objects, count)


def calibration_questions(
    *, seed: int = 0, num_samples: int = _NUM_CALIBRATION_IMAGES
) -> list[tuple[NDArray[np.uint8], str]]:
    """Training images, uint8 [H, W, 3], with one expression each; no held-out image is shown."""
    scenes = (
        generate_scene(split="train", seed=seed, index=index, num_expressions=1)
        for index in range(num_samples)
    )
    return [(scene.image, scene.expressions[0].text) for scene in scenes]
