"""TensorRT's phases become one stage of a hundred steps, and a build can be stopped."""

from __future__ import annotations

import threading
import types

import pytest

from gap_export.engines.monitor import STEPS, PhaseTally, make_monitor


@pytest.fixture
def told() -> list[int]:
    return []


@pytest.fixture
def tally(told: list[int]) -> PhaseTally:
    return PhaseTally(told.append)


def test_steps_of_the_outermost_phase_are_shares_of_the_whole(tally, told):
    tally.start("root", None, 4)
    for index in range(4):
        tally.step("root", index)
    assert told == [25, 25, 25, 25]
    tally.finish("root")
    assert sum(told) == STEPS


def test_a_phase_within_counts_as_part_of_the_next_step(tally, told):
    tally.start("root", None, 2)
    tally.start("inner", "root", 5)
    tally.start("innermost", "inner", 2)
    tally.step("innermost", 0)
    assert sum(told) == 5
    tally.step("inner", 0)
    assert sum(told) == 10
    tally.finish("inner")
    assert sum(told) == 50
    tally.step("root", 0)
    assert sum(told) == 50


def test_progress_never_goes_back_and_never_over(tally, told):
    tally.start("root", None, 2)
    for _ in range(3):
        tally.start("inner", "root", 2)
        tally.step("inner", 0)
        tally.step("inner", 1)
        tally.step("inner", 7)
        tally.finish("inner")
    tally.step("root", 0)
    tally.step("root", 1)
    tally.step("root", 1)
    assert min(told) > 0 and sum(told) == STEPS


def test_phases_that_were_not_announced_or_without_steps_do_no_harm(tally, told):
    tally.step("unknown", 0)
    tally.finish("unknown")
    tally.start("root", None, 0)
    tally.start("orphan", "missing", 3)
    tally.step("orphan", 0)
    assert told == []
    tally.finish("root")
    assert sum(told) == STEPS


def test_phases_that_name_each_other_end(tally, told):
    tally.start("a", "b", 2)
    tally.start("b", "a", 2)
    tally.step("a", 0)
    assert sum(told) <= STEPS


def test_a_build_goes_on_until_it_is_stopped(tally):
    module = types.SimpleNamespace(IProgressMonitor=object)
    stop = threading.Event()
    monitor = make_monitor(module, tally, stop)
    monitor.phase_start("root", None, 2)
    assert monitor.step_complete("root", 0) is True
    stop.set()
    assert monitor.step_complete("root", 1) is False
    monitor.phase_finish("root")
