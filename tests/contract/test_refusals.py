"""Bad command lines and bad files are refused as the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.refusals import Case, World, read_cases, run_case

CASES = read_cases()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, demo_bundle: Path) -> World:
    return World(tmp_path_factory.mktemp("world"), demo_bundle)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.command, marks=[pytest.mark.full] if case.is_slow else [])
        for case in CASES
    ],
)
def test_what_is_refused_stays_refused(case: Case, world: World) -> None:
    found = run_case(case, world)
    assert (found.code, found.left) == (case.code, False), found.err
    assert world.fill(case.words) in found.err
    assert "Traceback" not in found.err
    assert sum(line.lower().startswith("error: ") for line in found.err.splitlines()) <= 1


def test_the_table_names_each_command_once() -> None:
    assert len({case.command for case in CASES}) == len(CASES) >= 150
