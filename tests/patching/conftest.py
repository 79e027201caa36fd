from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.patching import PatchOptions, PatchReport, patch_export
from tests.patching.exports import Recipe, shared_export
from tests.shared import SharedFolder, sort_options

MakeExport = Callable[..., Path]
Patch = Callable[..., PatchReport]


@pytest.fixture(scope="session")
def make_export(tiny_checkpoint: Path, shared: SharedFolder) -> MakeExport:
    """Exports of the tiny model, each made once in a run; read only."""

    def make(**how: Any) -> Path:
        return shared_export(shared, tiny_checkpoint, Recipe(**how))

    return make


@pytest.fixture(scope="session")
def tiny_export(make_export: MakeExport) -> Path:
    """In float32, opset 17, by torch's first exporter. Read only."""
    return make_export()


@pytest.fixture
def own_export(tiny_export: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_export, tmp_path / "export"))


@pytest.fixture
def patch(tmp_path: Path) -> Patch:
    """Patches an export into a new folder."""

    def run(export: Path, *, keep_ratio: float = 0.3, **options: Any) -> PatchReport:
        out = tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"
        flat = {"keep_ratio": keep_ratio, **options}
        return patch_export(PatchOptions(export=export, out=out, **sort_options(flat)))

    return run


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """Two images of noise, wide and tall."""
    random = np.random.default_rng(0)
    return [random.integers(0, 255, size, dtype=np.uint8) for size in ((40, 50, 3), (64, 33, 3))]
