"""Faults of tiles and of joined patches; see :mod:`tests.parity.mutants`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from gap_export.parity.results import Level
from tests.parity.mutants import VISION, Mutant, add_constant, rewire, rewrite_graph

PIXELS = "pixel_values"


def thumbnail_first(bundle: Path, out: Path) -> Path:
    """The thumbnail is encoded before the tiles, as LLaVA-1.6 has it."""

    def edit(model: onnx.ModelProto) -> None:
        _reorder(model, [("thumbnail", -1, END, 1), ("tiles", 0, -1, 1)])

    return rewrite_graph(bundle, out, VISION, edit)


def tiles_backwards(bundle: Path, out: Path) -> Path:
    """Tiles are encoded from the last to the first; the thumbnail stays last."""

    def edit(model: onnx.ModelProto) -> None:
        _reorder(model, [("tiles", -2, -END, -1), ("thumbnail", -1, END, 1)])

    return rewrite_graph(bundle, out, VISION, edit)


def patches_joined_by_columns(bundle: Path, out: Path) -> Path:
    """The four patches of a token stand side by side column by column."""

    def edit(model: onnx.ModelProto) -> None:
        _join(model).CopyFrom(helper.make_attribute("perm", [0, 1, 3, 4, 2, 5]))

    return rewrite_graph(bundle, out, VISION, edit)


def tokens_by_columns(bundle: Path, out: Path) -> Path:
    """Tokens go down the columns of a tile: the authors' pixel shuffle, version 1."""

    def edit(model: onnx.ModelProto) -> None:
        _join(model).CopyFrom(helper.make_attribute("perm", [0, 3, 1, 2, 4, 5]))

    return rewrite_graph(bundle, out, VISION, edit)


TILE_MUTANTS: Mapping[str, tuple[Mutant, Level]] = {
    "thumbnail first": (thumbnail_first, "tensor"),
    "tiles backwards": (tiles_backwards, "tensor"),
    "patches joined by columns": (patches_joined_by_columns, "tensor"),
    "tokens by columns": (tokens_by_columns, "tensor"),
}

# Beyond any number of tiles.
END = 1 << 30


def _reorder(model: onnx.ModelProto, parts: list[tuple[str, int, int, int]]) -> None:
    """Have the tower read parts of the images, (name, start, end, step) each, in that order."""
    rewire(model, PIXELS, "reordered")
    add_constant(model, "first_axis", np.array([0], np.int64))
    nodes = []
    for name, *slices in parts:
        inputs = [PIXELS]
        for what, value in zip(("start", "end", "step"), slices, strict=True):
            add_constant(model, f"{name}_{what}", np.array([value], np.int64))
            inputs.append(f"{name}_{what}")
        inputs.insert(3, "first_axis")
        nodes.append(helper.make_node("Slice", inputs, [name], name))
    names = [name for name, *_ in parts]
    nodes.append(helper.make_node("Concat", names, ["reordered"], "reordered", axis=0))
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def _join(model: onnx.ModelProto) -> onnx.AttributeProto:
    """How the transposition that joins patches orders its six axes."""
    (found,) = (
        node.attribute[0]
        for node in model.graph.node
        if node.op_type == "Transpose" and list(node.attribute[0].ints) == [0, 1, 3, 2, 4, 5]
    )
    return found
