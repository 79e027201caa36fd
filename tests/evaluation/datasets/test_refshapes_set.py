from __future__ import annotations

import numpy as np
import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.refshapes import iter_samples


@pytest.mark.parametrize("spec", ["refshapes", "refshapes:heldout"])
def test_questions_are_those_of_iter_samples(spec: str) -> None:
    data = open_dataset(spec, samples=30, seed=3)
    samples = list(iter_samples(seed=3, num_samples=30))
    assert (data.spec, data.name, data.layout) == (spec, "refshapes", "refshapes")
    assert data.splits == ("heldout",)
    assert not data.unusable
    assert [(one.expression, one.box, one.kind) for one in data.questions] == [
        (sample.expression.text, sample.box, sample.expression.kind) for sample in samples
    ]
    for question, sample in zip(data.questions, samples, strict=True):
        image = question.image.load()
        assert isinstance(image, np.ndarray)
        np.testing.assert_array_equal(image, sample.image)


def test_training_split_has_other_scenes() -> None:
    heldout = open_dataset("refshapes", samples=8, seed=0)
    train = open_dataset("refshapes:train", samples=8, seed=0)
    assert train.splits == ("train",)
    assert not {one.id for one in train.questions} & {one.id for one in heldout.questions}
    assert train.fingerprint != heldout.fingerprint


def test_seed_is_part_of_the_fingerprint() -> None:
    prints = [open_dataset("refshapes", samples=4, seed=seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("spec", "samples", "message"),
    [
        ("refshapes:val", 4, "no such split: 'val'; allowed: heldout, train"),
        ("refshapes", None, "no end"),
        ("refshapes", 0, "too few samples: 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(spec: str, samples: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(spec, samples=samples, seed=0)
