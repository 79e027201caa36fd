"""Questions to calibrate with, where the user has none."""

from __future__ import annotations

from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes import generate_scene

# Enough for the mean size of every channel; AWQ's authors take as few.
NUM_SAMPLES = 32


def refshapes_questions(
    *, seed: int = 0, num_samples: int = NUM_SAMPLES
) -> list[tuple[NDArray[np.uint8], str]]:
    """RefShapes images of the training split, uint8 [H, W, 3], with one expression each.

    Args:
        seed: Seed of the images.
        num_samples: How many.
    """
    # What is held out has no part in it.
    scenes = (
        generate_scene(split="train", seed=seed, index=index, num_expressions=1)
        for index in count()
    )
    return [(scene.image, scene.expressions[0].text) for scene in islice(scenes, num_samples)]
