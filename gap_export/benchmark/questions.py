"""What every bundle is asked in a round: one image and some expressions about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.evaluation.refshapes import generate_scene
from gap_export.runtime.images.image import ImageInput

# Seed of the images that RefShapes makes; warm-up has others.
_SEED, _WARM_UP_SEED = 0, 1
# Different expressions that are looked for in a scene; there are seldom more.
_MAX_OF_SCENE = 16


@dataclass(frozen=True, kw_only=True)
class Round:
    """One question of all.

    Attributes:
        number: From 0; of the warm-up below 0.
        image: The user's file; None for a scene of RefShapes.
        expressions: The user's; empty for the scene's own.
        num_expressions: How many are asked.
    """

    number: int
    image: Path | None
    expressions: tuple[str, ...]
    num_expressions: int

    def load(self) -> tuple[ImageInput, list[str]]:
        """The image and that many expressions; again from the first where there are too few."""
        seed = _SEED if self.number >= 0 else _WARM_UP_SEED
        scene = generate_scene(
            split="heldout",
            seed=seed,
            index=abs(self.number),
            num_expressions=max(_MAX_OF_SCENE, self.num_expressions),
        )
        texts = self.expressions or tuple(one.text for one in scene.expressions)
        image = scene.image if self.image is None else self.image
        return image, list(islice(cycle(texts), self.num_expressions))


def plan_rounds(
    *,
    num_rounds: int,
    num_expressions: int,
    images: Sequence[Path] = (),
    expressions: Sequence[str] = (),
) -> list[Round]:
    """Rounds of the user's images and expressions, in turn, or of RefShapes'.

    Raises:
        UsageError: fewer than one round or expression; an image that is no file.
    """
    if min(num_rounds, num_expressions) < 1:
        raise UsageError(
            "nothing to measure",
            seen=f"{num_rounds} rounds of {num_expressions} expressions",
            allowed="at least one of each",
        )
    missing = next((path for path in images if not path.is_file()), None)
    if missing is not None:
        raise UsageError("no such image", seen=missing)
    return [
        Round(
            number=number,
            image=images[number % len(images)] if images else None,
            expressions=tuple(expressions),
            num_expressions=num_expressions,
        )
        for number in range(num_rounds)
    ]
