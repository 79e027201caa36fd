"""Scores of what is there and of what is not: rates, areas, intervals, thresholds."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import gap_export
from gap_export.bundle import open_bundle
from gap_export.bundle.calibration import read_calibration
from gap_export.errors import BundleError, UsageError
from gap_export.evaluation.absence import (
    ScoredAnswers,
    calibration_error,
    curve_points,
    summarize,
    trace_curve,
)
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.refshapes import absent_expressions, generate_scene
from gap_export.evaluation.refshapes.absent import ABSENT_KINDS
from gap_export.evaluation.refshapes.expressions import RELATIONS, WORDS
from gap_export.runtime.session import GroundingSession


def answers_of(present: list[float], absent: list[float]) -> ScoredAnswers:
    scores = np.array([*present, *absent])
    is_there = np.arange(len(scores)) < len(present)
    return ScoredAnswers(
        scores=scores, is_there=is_there, images=tuple(f"{n // 2}" for n in range(len(scores)))
    )


def test_area_is_the_share_of_pairs_in_order_and_ties_count_half():
    rng = np.random.default_rng(5)
    present, absent = rng.integers(0, 6, 40) / 6, rng.integers(0, 4, 30) / 6
    pairs = present[:, None] - absent[None]
    expected = (pairs > 0).mean() + (pairs == 0).mean() / 2
    answers = answers_of(present.tolist(), absent.tolist())
    assert trace_curve(answers).auroc == pytest.approx(expected)
    # An answer that counts twice is two answers.
    weights = rng.integers(0, 3, 70).astype(np.float64)
    repeated = ScoredAnswers(
        scores=np.repeat(answers.scores, weights.astype(int)),
        is_there=np.repeat(answers.is_there, weights.astype(int)),
        images=(),
    )
    drawn = trace_curve(answers, np.stack([weights, np.ones(70)]))
    assert drawn.auroc.tolist() == pytest.approx([float(trace_curve(repeated).auroc), expected])


def test_threshold_is_the_highest_that_reaches_the_recall():
    answers = answers_of([0.9, 0.8, 0.7, 0.6], [0.85, 0.65, 0.1, 0.0])
    found = summarize(answers, seed=0, recall=0.75)
    assert (found.threshold, found.recall, found.false_box_rate) == (0.7, 0.75, 0.25)
    assert found.num_boxes == 3
    found = summarize(answers, seed=0)
    assert (found.threshold, found.recall, found.false_box_rate) == (0.6, 1.0, 0.5)


def test_answers_without_a_box_are_never_found():
    found = summarize(answers_of([0.9, 0.0], [0.5, 0.0]), seed=0)
    assert (found.threshold, found.recall, found.false_box_rate) == (0.5, 0.5, 0.5)
    assert curve_points(trace_curve(answers_of([0.9, 0.0], [0.5, 0.0]))) == (
        (0.9, 0.0, 0.5), (0.5, 0.5, 0.5),
    )  # fmt: skip


def test_interval_holds_the_area_and_narrows_with_more_images():
    rng = np.random.default_rng(1)

    def width(count: int) -> float:
        answers = answers_of(
            rng.normal(0.6, 0.1, count).tolist(), rng.normal(0.5, 0.1, count).tolist()
        )
        found = summarize(answers, seed=3)
        assert found.auroc_ci95[0] < found.auroc < found.auroc_ci95[1]
        assert summarize(answers, seed=3) == found
        return found.auroc_ci95[1] - found.auroc_ci95[0]

    assert width(400) < width(40) / 2


def test_calibration_error_is_zero_where_scores_are_shares():
    assert calibration_error(answers_of([0.75] * 3, [0.75])) == pytest.approx(0)
    assert calibration_error(answers_of([0.75] * 2, [0.75] * 2)) == pytest.approx(0.25)
    assert calibration_error(answers_of([1.0], [1.0])) == pytest.approx(0.5)


def _answers_to(text: str, objects: Any) -> list[int]:
    """Objects that a phrase is true of, read word by word and without any margin."""

    def like(words: list[str]) -> list[int]:
        return [
            place
            for place, one in enumerate(objects)
            if all(word in (one.size, one.color, one.shape) for word in words if word != "the")
        ]

    for relation in RELATIONS:
        if f" {relation} " in text:
            target, anchor = (part.split() for part in text.split(f" {relation} "))
            axis = 0 if "of" in relation else 1
            sign = 1 if relation in ("above", "left of") else -1
            return [
                one
                for one in like(target)
                for other in like(anchor)
                if one != other
                and sign * objects[one].center[axis] < sign * objects[other].center[axis]
            ]
    return like(text.split())


def test_no_object_answers_to_an_absent_expression():
    kinds: dict[str, int] = {}
    for index in range(120):
        scene = generate_scene(split="heldout", seed=2, index=index)
        found = absent_expressions(scene, 4)
        assert found == absent_expressions(scene, 4)
        assert len({one.text for one in found}) == len(found) >= 3
        for one in found:
            assert _answers_to(one.text, scene.objects) == [], one
            assert set(one.text.split()) <= {word for each in WORDS for word in each.split()}
            kinds[one.kind] = kinds.get(one.kind, 0) + 1
        # And the judge of this test is not blind.
        for known in scene.expressions:
            if known.kind != "superlative" and "object" not in known.text:
                assert known.target in _answers_to(known.text, scene.objects)
    assert set(kinds) == set(ABSENT_KINDS) and min(kinds.values()) > 40


def test_data_set_has_the_share_asked_for_on_top_of_what_is_there():
    plain = open_dataset("refshapes", samples=60, seed=0)
    mixed = open_dataset("refshapes", samples=60, seed=0, absent=0.4)
    assert mixed.questions == plain.questions and plain.absent == ()
    assert len(mixed.absent) == 40 and mixed.fingerprint != plain.fingerprint
    asked = [one.image_id for one in mixed.asked]
    # Those about one image stand together.
    assert len(asked) == 100 and sum(a != b for a, b in pairwise(asked)) == 14
    with pytest.raises(UsageError, match="share of absent"):
        open_dataset("refshapes", samples=60, seed=0, absent=0.9)


def test_own_data_says_by_a_null_box_what_is_not_there(tmp_path):
    lines = [
        {"image": "a.png", "expression": "the cup", "box": box} for box in ([1, 2, 3, 4], None)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = open_dataset(str(tmp_path), samples=None, seed=0)
    assert [one.id for one in found.asked] == ["0", "1"] and found.absent[0].box is None
    with pytest.raises(UsageError, match="known of drawn scenes alone"):
        open_dataset(str(tmp_path), samples=None, seed=0, absent=0.3)
    (tmp_path / "questions.jsonl").write_text(json.dumps(lines[1]))
    with pytest.raises(UsageError, match="no expression of the data set has an object"):
        open_dataset(str(tmp_path), samples=None, seed=0)


@pytest.fixture(scope="module")
def calibrated(demo_bundle, tmp_path_factory) -> Any:
    """A copy of the demo bundle with its calibration."""
    import shutil

    copy = tmp_path_factory.mktemp("calibrated") / "demo"
    shutil.copytree(demo_bundle, copy)
    return copy, gap_export.calibrate(copy, samples=24, recall=0.5)


def test_calibration_gives_verdicts(calibrated):
    bundle, found = calibrated
    assert (found.num_present, found.num_absent) == (24, 24) and found.recall >= 0.5
    assert read_calibration(open_bundle(bundle, verify="full")) == found
    dataset = open_dataset("refshapes", samples=24, seed=found.seed, absent=0.5)
    assert dataset.fingerprint == found.data_sha256
    with GroundingSession.open(bundle) as session:
        answers = [session.ground(one.image.load(), one.expression) for one in dataset.questions]
    verdicts = [answer.found for answer in answers]
    assert verdicts == [(one.score or 0.0) >= found.threshold for one in answers]
    assert sum(map(bool, verdicts)) / len(verdicts) == pytest.approx(found.recall)
    assert answers[0].to_plain()["boxes"][0]["found"] is verdicts[0]


def test_other_ways_of_answering_have_no_verdict_and_say_so(calibrated):
    bundle, _ = calibrated
    image = generate_scene(split="heldout", seed=0, index=0).image
    with GroundingSession.open(bundle, grammar="box") as session:
        answer = session.ground(image, "the red circle")
    assert answer.found is None and "no verdict" in answer.warnings[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bundle_sha256": "0" * 64}, "of another bundle"),
        ({"format_version": 2}, "another version"),
        ({"format": "x"}, "damaged"),
        ({"threshold": 1.5}, "no probability"),
        ({"threshold": "0.5"}, "wrong type"),
        ({"extra": 1}, "wrong keys"),
        (None, "damaged"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(calibrated, change, said):
    bundle, _ = calibrated
    file = bundle / "calibration.json"
    whole = file.read_bytes()
    try:
        plain = {**json.loads(whole), **(change or {})}
        file.write_text(json.dumps(plain)[: None if change else 40])
        with pytest.raises(BundleError, match=said):
            read_calibration(open_bundle(bundle))
        with pytest.raises(BundleError, match=said):
            GroundingSession.open(bundle)
    finally:
        file.write_bytes(whole)


def test_a_data_set_without_enough_of_both_kinds_is_refused(calibrated):
    bundle, _ = calibrated
    for options in ({"samples": 5}, {"samples": 40, "absent": 0.05}):
        with pytest.raises(UsageError, match="too few expressions"):
            gap_export.calibrate(bundle, **options)
    with pytest.raises(UsageError, match="no such recall"):
        gap_export.calibrate(bundle, recall=0.0)
    assert dataclasses.asdict(read_calibration(open_bundle(bundle)))["num_present"] == 24
