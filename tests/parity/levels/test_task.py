"""Acc@0.5 of both sides against the true boxes."""

from __future__ import annotations

import pytest

from gap_export.parity.levels.task import judge_task
from tests.parity.levels.pairs import BOX, answer, other, pair, same

FAR = (60.0, 60.0, 90.0, 90.0)


def won():
    return pair(answer(box=None), answer(), truth=BOX)


def test_as_many_hits_pass():
    found = judge_task([same(BOX)] * 9 + [same(FAR)])
    assert found.status == "passed"
    figures = found.figures
    assert figures["reference_acc_at_50"] == figures["candidate_acc_at_50"] == 0.9
    assert figures["difference"] == 0
    assert figures["difference_low"] < 0 < figures["difference_high"]


def test_significantly_fewer_hits_fail():
    found = judge_task([same(BOX)] * 20 + [other(BOX)] * 20)
    assert found.status == "failed"
    assert "50.0 % and not 100.0 %, significantly worse" in found.reason
    assert found.figures["difference"] == -0.5
    assert found.figures["difference_high"] < 0
    assert (found.figures["lost"], found.figures["won"]) == (20, 0)


def test_a_few_hits_less_are_chance():
    found = judge_task([same(BOX)] * 39 + [other(BOX)])
    assert found.status == "passed"
    assert found.figures["difference"] == -1 / 40


def test_more_hits_pass():
    found = judge_task([same(BOX)] * 10 + [won()] * 20)
    assert found.status == "passed"
    assert found.figures["difference"] == pytest.approx(2 / 3)
    assert found.figures["difference_low"] > 0


def test_other_boxes_that_hit_as_well_are_not_looked_at():
    near = (11.0, 10.0, 50.0, 50.0)
    assert judge_task([other(BOX, box=near)] * 40).status == "passed"


@pytest.mark.parametrize(("bar", "status"), [(0.9, "passed"), (0.91, "failed")])
def test_the_bar_is_the_candidates_accuracy(bar, status):
    found = judge_task([same(BOX)] * 9 + [same(FAR)], bar=bar)
    assert found.status == status
    assert bool(found.reason) == (status == "failed")


def test_questions_without_a_true_box_do_not_count():
    assert judge_task([same(BOX), other(None)]).figures["questions"] == 1
    found = judge_task([same(None)], bar=1.0)
    assert found.status == "not_run" and "no question" in found.reason
