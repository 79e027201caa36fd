"""Faults of bundles whose positions have three axes, or that add taps behind their first layers.

As in :mod:`tests.parity.mutants`: each is valid in every other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from gap_export.bundle import open_bundle
from gap_export.parity.results import Level
from tests.parity.mutants import (
    DECODER,
    IDS,
    SLOTS,
    TABLE,
    VISION,
    Mutant,
    add_constant,
    gap_node,
    insert_before_gap,
    rewire,
    rewrite_graph,
)

Steps = list[tuple[str, list[str], str, dict[str, Any]]]


def rows_and_columns_exchanged(bundle: Path, out: Path) -> Path:
    """RoPE reads a token's column where its row is due."""

    def edit(model: onnx.ModelProto) -> None:
        add_constant(model, "other_order", np.array([0, 2, 1], np.int64))
        insert_behind_gap(model, [("Gather", [IDS, "other_order"], "exchanged", {"axis": 0})])

    return rewrite_graph(bundle, out, DECODER, edit)


def frequencies_of_columns_turn_by_rows(bundle: Path, out: Path) -> Path:
    """The ids are right, and no frequency takes those of columns."""

    def edit(model: onnx.ModelProto) -> None:
        (gather,) = (
            node for node in model.graph.node if node.op_type == "Gather" and node.input[0] == IDS
        )
        name = gather.input[1]
        held = [one for one in model.graph.initializer if one.name == name]
        held += [node.attribute[0].t for node in model.graph.node if list(node.output) == [name]]
        (axes,) = held
        axes.CopyFrom(numpy_helper.from_array(np.minimum(numpy_helper.to_array(axes), 1), name))

    return rewrite_graph(bundle, out, DECODER, edit)


def columns_zeroed(bundle: Path, out: Path) -> Path:
    """Every token is in column 0."""

    def edit(model: onnx.ModelProto) -> None:
        add_constant(model, "not_columns", np.array([1, 1, 0], np.int64).reshape(3, 1, 1))
        insert_behind_gap(model, [("Mul", [IDS, "not_columns"], "zeroed", {})])

    return rewrite_graph(bundle, out, DECODER, edit)


def text_behind_largest_kept_id(bundle: Path, out: Path) -> Path:
    """Text goes on behind the largest id that is left of the image, as if it had been cropped."""

    def edit(model: onnx.ModelProto) -> None:
        for axis, name in enumerate(("time", "row", "column")):
            add_constant(model, f"{name}_axis", np.array(axis, np.int64))
        for name, value in (("none", -1), ("late", 1 << 40), ("zero", 0), ("one_id", 1)):
            add_constant(model, name, np.array(value, np.int64))
        add_constant(model, "along", np.array([1], np.int64))
        steps: Steps = [
            *(
                ("Gather", [TABLE, f"{name}_axis"], name, {"axis": 0})
                for name in ("time", "row", "column")
            ),
            ("Max", ["row", "column"], "most", {}),
            ("Equal", ["time", "most"], "is_text", {}),
            ("Where", ["is_text", "none", "most"], "of_image", {}),
            ("ReduceMax", ["of_image", "along"], "last_kept", {}),
            ("Greater", ["time", "last_kept"], "is_behind", {}),
            ("Where", ["is_behind", "time", "late"], "behind", {}),
            ("ReduceMin", ["behind", "along"], "first_behind", {}),
            ("Sub", ["first_behind", "last_kept"], "distance", {}),
            ("Sub", ["distance", "one_id"], "gap", {}),
            ("Where", ["is_behind", "gap", "zero"], "shift", {}),
            ("Sub", [TABLE, "shift"], "shifted", {}),
        ]
        insert_before_gap(model, steps)

    return rewrite_graph(bundle, out, DECODER, edit)


def decode_by_unpruned_delta(bundle: Path, out: Path) -> Path:
    """Decode adds the unpruned prompt's offset to slots of the pruned one; prefill is right."""
    pruning = open_bundle(bundle).manifest.pruning
    dropped = pruning.num_visual_tokens - pruning.num_emitted_tokens

    def edit(model: onnx.ModelProto) -> None:
        add_constant(model, "dropped", np.array(dropped, np.int64))
        add_constant(model, "nothing", np.array(0, np.int64))
        steps: Steps = [
            ("Shape", [TABLE], "length", {"start": 2, "end": 3}),
            ("Less", [SLOTS, "length"], "is_prompt", {}),
            ("Where", ["is_prompt", "nothing", "dropped"], "lost", {}),
            ("Sub", [IDS, "lost"], "too_early", {}),
        ]
        insert_behind_gap(model, steps)

    return rewrite_graph(bundle, out, DECODER, edit)


def taps_left_out(bundle: Path, out: Path) -> Path:
    """Nothing is added behind the first layers (DeepStack)."""

    def edit(model: onnx.ModelProto) -> None:
        (split,) = (node for node in model.graph.node if node.op_type == "Split")
        taps = set(split.output[1:])
        for node in [node for node in model.graph.node if taps & set(node.input)]:
            assert node.op_type == "Add"
            (hidden,) = set(node.input) - taps
            node.CopyFrom(helper.make_node("Identity", [hidden], list(node.output), node.name))

    return rewrite_graph(bundle, out, DECODER, edit)


def taps_of_other_tokens(bundle: Path, out: Path) -> Path:
    """What is added behind the first layers is of each kept token's neighbour."""
    manifest = open_bundle(bundle).manifest
    hidden, kept = manifest.decoder.hidden_size, manifest.pruning.num_emitted_tokens

    def edit(model: onnx.ModelProto) -> None:
        features = "image_features"
        for node in model.graph.node:
            node.output[:] = ["every_plane" if n == features else n for n in node.output]
        rewire(model, features, "every_plane")
        for name, values in (
            ("start", [0]), ("hidden", [hidden]), ("end", [1 << 40]), ("width", [2]),
            ("neighbours", np.roll(np.arange(kept), 1)),
        ):  # fmt: skip
            add_constant(model, name, np.array(values, np.int64))
        steps: Steps = [
            ("Slice", ["every_plane", "start", "hidden", "width"], "main", {}),
            ("Slice", ["every_plane", "hidden", "end", "width"], "taps", {}),
            ("Gather", ["taps", "neighbours"], "other_taps", {"axis": 1}),
            ("Concat", ["main", "other_taps"], features, {"axis": 2}),
        ]
        model.graph.node.extend(
            helper.make_node(kind, given, [made], made, **more) for kind, given, made, more in steps
        )

    return rewrite_graph(bundle, out, VISION, edit)


def insert_behind_gap(model: onnx.ModelProto, steps: Steps) -> None:
    """Work on the ids before anything reads them."""
    rewire(model, IDS, steps[-1][2])
    at = 1 + list(model.graph.node).index(gap_node(model))
    for op_type, inputs, output, attributes in reversed(steps):
        model.graph.node.insert(
            at, helper.make_node(op_type, inputs, [output], output, **attributes)
        )


# Each fault with the first level that must fail. Those of ids are found by reading them: of
# columns in Qwen2.5-VL no logit tells.
AXES_MUTANTS: Mapping[str, tuple[Mutant, Level]] = {
    "rows and columns of ids exchanged": (rows_and_columns_exchanged, "positions"),
    "frequencies of columns turn by rows": (frequencies_of_columns_turn_by_rows, "positions"),
    "columns zero": (columns_zeroed, "positions"),
    "text behind the largest kept id": (text_behind_largest_kept_id, "positions"),
    "decode by the unpruned offset": (decode_by_unpruned_delta, "positions"),
}
TAPS_MUTANTS: Mapping[str, tuple[Mutant, Level]] = {
    "DeepStack left out": (taps_left_out, "tensor"),
    "DeepStack of other tokens": (taps_of_other_tokens, "tensor"),
}
