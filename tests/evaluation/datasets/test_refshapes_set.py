from __future__ import annotations

import numpy as np
import pytest

from gap_export.errors import UsageError
from gap_export.evaluation import refshapes2
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


def test_questions_of_the_second_set_are_those_of_its_scenes() -> None:
    data = open_dataset("refshapes-2", samples=10, seed=3)
    assert (data.name, data.layout, data.splits) == ("refshapes-2", "refshapes-2", ("heldout",))
    assert not data.unusable
    scenes = [
        refshapes2.generate_scene(split="heldout", seed=3, index=index, num_expressions=4)
        for index in range(3)
    ]
    asked = [(scene, one) for scene in scenes for one in scene.expressions]
    for question, (scene, one) in zip(data.questions, asked, strict=False):
        assert question.expression == one.text
        assert question.kind == one.kind
        assert question.box == scene.objects[one.target].box
        assert question.image_size == scene.image.shape[1::-1]
        np.testing.assert_array_equal(question.image.load(), scene.image)
    # Records of both may lie in one folder.
    first = open_dataset("refshapes", samples=10, seed=3)
    assert not {one.id for one in first.questions} & {one.id for one in data.questions}


@pytest.mark.parametrize("name", ["refshapes", "refshapes-2"])
def test_training_split_has_other_scenes(name: str) -> None:
    heldout = open_dataset(name, samples=8, seed=0)
    train = open_dataset(f"{name}:train", samples=8, seed=0)
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
        ("refshapes-2:val", 4, "refshapes-2 has no such split: 'val'; allowed: heldout, train"),
        ("refshapes", None, "no end"),
        ("refshapes-2", None, "no end"),
        ("refshapes", 0, "too few samples: 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(spec: str, samples: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(spec, samples=samples, seed=0)


@pytest.mark.parametrize("name", ["refshapes", "refshapes-2"])
def test_share_of_what_is_not_there_holds(name: str) -> None:
    data = open_dataset(name, samples=40, seed=0, absent=0.2)
    assert (len(data.questions), len(data.absent)) == (40, 10)
    assert {one.image_id for one in data.absent} <= {one.image_id for one in data.questions}
