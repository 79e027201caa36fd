"""Who else runs is read off /proc, and own work is not held against others."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from gap_export.benchmark import machine

STAT = """cpu  1 2 3 4 5 6 7 8 9 9
cpu0 100 10 50 9000 800 3 2 5 70 7
cpu1 200 0 0 9000 0 0 0 0 0 0
cpu2 900 0 0 0 0 0 0 0 0 0
intr 12345 cpu0
"""


def test_busy_time_is_of_the_processors_asked_for_without_idle_waiting_and_guests():
    ticks = (100 + 10 + 50 + 3 + 2 + 5) + 200
    assert machine.busy_seconds(STAT, [0, 1]) == ticks / os.sysconf("SC_CLK_TCK")


def test_own_work_is_no_other_process():
    with machine.watched() as load:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
    assert load.cpu_s >= 0.1
    assert load.wall_s > 0
    # All the rest of the machine may be busy, but no more than that.
    assert 0.0 <= load.others <= 1.05


def test_work_of_a_process_that_is_named_is_no_others():
    with machine.watched(os.getpid()) as load:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
    assert load.cpu_s >= 0.08, "counted in ticks"


def test_others_are_what_is_busy_and_not_own(monkeypatch):
    stats = iter([STAT, STAT.replace("cpu1 200", "cpu1 260")])
    monkeypatch.setattr(machine, "_STAT", SimpleNamespace(read_text=lambda: next(stats)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "_own_seconds", lambda pid: 0.0)
    with machine.watched() as load:
        pass
    per_second = os.sysconf("SC_CLK_TCK")
    assert load.others == pytest.approx((60 / per_second - 2 / per_second) / 2)


def test_memory_of_this_process_is_what_it_is():
    memory = machine.memory_of_this_process()
    assert 0 < memory.own <= memory.steady <= memory.peak


def test_rates_are_positive(monkeypatch):
    for name in ("_GEMM_SIDE", "_READ_ROWS", "_READ_COLS"):
        monkeypatch.setattr(machine, name, 64)
    assert machine.gemm_gflops() > 0
    assert machine.bandwidth_gb_s() > 0
