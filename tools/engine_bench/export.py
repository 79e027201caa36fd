"""Exports up to where the first engine would be built."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.engines.memory import peak_bytes
from gap_export.exporting import ExportOptions, export_checkpoint, export_model
from gap_export.progress import Advance
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.recipe import find_recipe
from gap_export.spec.requests import EnginesRequest, PruningRequest

# How the stages that matter here are called.
QUANTIZING = "quantizing weights"
_BUILDING = "building "


def export(
    checkpoint: str, out: str, recipe: str, keep_ratio: float, target: str, block_size: int | None
) -> dict[str, Any]:
    """Export for a target as the command line does, and build nothing.

    Args:
        checkpoint: Its folder.
        out: The bundle's folder, replaced where there is one.
        recipe: What the checkpoint follows.
        keep_ratio: Share of the visual tokens to keep.
        target: The value of ``--trt``.
        block_size: Weights of INT4 that share a scale; None for the checkpoint's dtype.

    Returns:
        For each stage its seconds, and the process's peak memory in bytes when it ended.
    """
    quantization = None
    if block_size is not None:
        quantization = QuantizationSpec(
            dtype="int4", block_size=block_size, method="rtn", lm_head=False
        )
    stages = _UpToEngines()
    options = ExportOptions(
        model=checkpoint,
        pruning=PruningRequest(keep_ratio=keep_ratio),
        engines=EnginesRequest(targets=(target,)),
        recipe=recipe,
        out=Path(out),
        force=True,
        quantization=quantization,
    )
    try:
        export_model(options, progress=stages)
    except _EnginesComeNextError:
        return stages.measured
    raise RuntimeError("engines were built, and are in the figures of the export")


def export_cut(out: str, recipe: str, keep_ratio: float, target: str, num_layers: int) -> None:
    """Export random weights of a recipe's shape, but for the decoder's depth, and build nothing.

    Args:
        out: The bundle's folder, replaced where there is one.
        recipe: Whose shape.
        keep_ratio: Share of the visual tokens to keep.
        target: The value of ``--trt``.
        num_layers: Layers of the decoder.
    """
    whole, _ = find_recipe(recipe)
    shape = whole.architecture
    assert shape is not None
    cut = replace(shape, decoder=replace(shape.decoder, num_layers=num_layers))
    options = ExportOptions(
        model=recipe,
        pruning=PruningRequest(keep_ratio=keep_ratio),
        engines=EnginesRequest(targets=(target,)),
        out=Path(out),
        force=True,
        random_weights=True,
    )
    random = Checkpoint(parts={}, random_seed=0)
    try:
        export_checkpoint(
            whole.model_copy(update={"architecture": cut}),
            random,
            options,
            progress=_UpToEngines(),
        )
    except _EnginesComeNextError:
        return
    raise RuntimeError("engines were built, though none were to be")


class _EnginesComeNextError(Exception):
    """The bundle is there, and stays."""


class _UpToEngines:
    """Implements :class:`gap_export.progress.Progress`: measures stages, ends before an engine."""

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        del total
        if title.startswith(_BUILDING):
            raise _EnginesComeNextError
        start = time.perf_counter()
        yield _ignore
        seconds = time.perf_counter() - start
        self.measured[title] = {"seconds": seconds, "peak_bytes": peak_bytes()}


def _ignore(steps: int) -> None:
    del steps
