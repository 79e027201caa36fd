"""Tiny checkpoints that several modules read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.qwen_vl.tiny import FAMILIES, Tiny, make_tiny


@pytest.fixture(scope="package")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A checkpoint of a family, made once. Read only."""
    made: dict[str, Tiny] = {}

    def find(family: str) -> Tiny:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp("qwen") / family)
        return made[family]

    return find


@pytest.fixture(scope="package", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> Tiny:
    """Each family's in turn. Read only."""
    found: Tiny = tiny_of(request.param)
    return found


@pytest.fixture
def writable(tiny: Tiny, tmp_path: Path) -> Tiny:
    """Each family's in turn, in a folder that a test may change."""
    return make_tiny(tiny.family, tmp_path / tiny.family)
