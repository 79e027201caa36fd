"""Builds what tests wrote, or says why it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import CheckpointError, ExitCode
from gap_export.families import Reference, build_reference, read_source, resolve_pruning
from gap_export.families.common.reference import Device
from gap_export.spec.recipe import Recipe, load_recipe
from gap_export.spec.requests import PruningRequest


def build(
    recipe: Recipe | None,
    parts: Mapping[str, Path] | Path,
    pruner: str = "spatial",
    keep_ratio: float = 1.0,
    *,
    device: Device = "cpu",
    dtype: str | None = None,
) -> Reference:
    """A reference; a folder is the main part, and has a recipe where none is given."""
    parts = {"main": parts} if isinstance(parts, Path) else parts
    recipe = recipe or load_recipe(parts["main"] / "recipe.yaml")
    request = PruningRequest(pruner=pruner, keep_ratio=keep_ratio, order="raster")
    pruning = resolve_pruning(recipe, request)
    return build_reference(recipe, Checkpoint(parts=parts), pruning, device=device, dtype=dtype)


def refusal(recipe: Recipe, parts: Mapping[str, Path] | Path) -> str:
    """Why a checkpoint cannot be read."""
    parts = {"main": parts} if isinstance(parts, Path) else parts
    with pytest.raises(CheckpointError) as caught:
        read_source(recipe, Checkpoint(parts=parts))
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value)


def write_empty(file: Path, keys: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of these tensors that takes no room: only its header is written."""
    header, offset = {}, 0
    for key, shape in keys.items():
        end = offset + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + offset)
