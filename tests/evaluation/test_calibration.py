"""Images to calibrate with are those of training."""

from __future__ import annotations

import numpy as np

from gap_export.evaluation.calibration import NUM_SAMPLES, refshapes_questions
from gap_export.evaluation.refshapes import generate_scene, iter_samples


def test_questions_are_of_the_training_split_one_for_each_image():
    questions = refshapes_questions(seed=3, num_samples=5)
    assert len(questions) == 5
    for index, (image, text) in enumerate(questions):
        scene = generate_scene(split="train", seed=3, index=index, num_expressions=1)
        assert np.array_equal(image, scene.image)
        assert text == scene.expressions[0].text


def test_no_image_is_one_that_accuracy_is_measured_on():
    held_out = {s.scene.image.tobytes() for s in iter_samples(seed=0, num_samples=4 * NUM_SAMPLES)}
    questions = refshapes_questions()
    assert len(questions) == NUM_SAMPLES
    assert not held_out & {image.tobytes() for image, _ in questions}
