"""Bundles with one fault each, valid in every other way: what a check must catch.

Each function takes an honest bundle of the tiny model and a folder that is not there yet, writes
the faulty bundle there, its manifest and hashes in order, and returns that folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from gap_export.bundle import open_bundle, write_bundle
from gap_export.bundle.files import HASH_NAME
from gap_export.parity.results import Level
from gap_export.spec.manifest import MANIFEST_NAME, Manifest

DECODER, VISION = "decoder_model_merged", "vision_encoder"
# What the bundle's own graphs call things.
SLOTS, TABLE, IDS = "position_ids", "kept_positions", "original_position_ids"

Mutant = Callable[[Path, Path], Path]
GraphEdit = Callable[[onnx.ModelProto], None]
WeightEdit = Callable[[NDArray[Any]], NDArray[Any]]


def gap_node_removed(bundle: Path, out: Path) -> Path:
    """RoPE reads slots, as if nothing had been pruned."""

    def edit(model: onnx.ModelProto) -> None:
        node = gap_node(model)
        model.graph.node.remove(node)
        rewire(model, IDS, SLOTS)

    return rewrite_graph(bundle, out, DECODER, edit)


def neighbour_in_table(bundle: Path, out: Path) -> Path:
    """The node reads ``kept_positions`` one entry further on."""

    def edit(model: onnx.ModelProto) -> None:
        gather = function_node(model, "GatherElements")
        minimum = function_node(model, "Min")
        function = model.functions[0]
        at = list(function.node).index(gather)
        one = next(node.output[0] for node in function.node if node.op_type == "Constant")
        further = helper.make_node("Add", [gather.input[1], one], ["further"])
        within = helper.make_node("Min", ["further", minimum.input[1]], ["within"])
        gather.input[1] = "within"
        function.node.insert(at, within)
        function.node.insert(at, further)

    return rewrite_graph(bundle, out, DECODER, edit)


def table_off_by_one(bundle: Path, out: Path) -> Path:
    """Every id is one too large: attention, which sees differences, computes the same."""

    def edit(model: onnx.ModelProto) -> None:
        add_constant(model, "one_more", np.array([1], np.int64))
        insert_before_gap(model, [("Add", [TABLE, "one_more"], "shifted_table", {})])

    return rewrite_graph(bundle, out, DECODER, edit)


def decode_offset_lost(bundle: Path, out: Path) -> Path:
    """Every token of an answer has the id of the prompt's last one."""

    def edit(model: onnx.ModelProto) -> None:
        add = function_node(model, "Add")
        table = function_node(model, "GatherElements").output[0]
        add.CopyFrom(helper.make_node("Identity", [table], list(add.output)))

    return rewrite_graph(bundle, out, DECODER, edit)


def compact_positions(bundle: Path, out: Path) -> Path:
    """The node is there, and reads a table 0, 1, 2, ... instead of the one it is fed."""

    def edit(model: onnx.ModelProto) -> None:
        for name, value in (("zero_times", [0]), ("one_more", [1])):
            add_constant(model, name, np.array(value, np.int64))
        add_constant(model, "along_rows", np.array(1, np.int64))
        insert_before_gap(
            model,
            [
                ("Mul", [TABLE, "zero_times"], "zeros", {}),
                ("Add", ["zeros", "one_more"], "ones", {}),
                ("CumSum", ["ones", "along_rows"], "counted", {"exclusive": 1}),
            ],
        )

    return rewrite_graph(bundle, out, DECODER, edit)


def keys_with_half_ids(bundle: Path, out: Path) -> Path:
    """Keys are rotated by ids that went through float16; queries are not."""

    def edit(model: onnx.ModelProto) -> None:
        rotation = [
            node
            for node in model.graph.node
            if {"Cos", "Sin"} & set(op_types_below(model, node)) or node.op_type in {"Cos", "Sin"}
        ]
        rotation = [node for node in rotation if IDS in above(model, node.output[0])]
        half = helper.make_node("Cast", [IDS], ["half_ids"], to=TensorProto.FLOAT16)
        names = {name: f"{name}_half" for node in rotation for name in node.output}
        copies = [half]
        for node in rotation:
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            copy.name = f"{node.name}_half"
            copy.input[:] = [
                "half_ids" if name == IDS else names.get(name, name) for name in node.input
            ]
            copy.output[:] = [names[name] for name in node.output]
            copies.append(copy)
        at = 1 + max(list(model.graph.node).index(node) for node in rotation)
        turned = {node.output[0] for node in rotation if node.op_type in {"Cos", "Sin"}}
        for node in model.graph.node:
            if node.op_type == "Mul" and turned & set(node.input) and is_key(model, node):
                node.input[:] = [names.get(name, name) for name in node.input]
        for copy in reversed(copies):
            model.graph.node.insert(at, copy)

    return rewrite_graph(bundle, out, DECODER, edit)


def rows_and_columns_swapped(bundle: Path, out: Path) -> Path:
    """Patches are read column by column."""

    def edit(model: onnx.ModelProto) -> None:
        conv = next(node for node in model.graph.node if node.op_type == "Conv")
        grid = conv.output[0]
        rewire(model, grid, "turned_grid")
        turn = helper.make_node("Transpose", [grid], ["turned_grid"], "turn", perm=[0, 1, 3, 2])
        model.graph.node.insert(1 + list(model.graph.node).index(conv), turn)

    return rewrite_graph(bundle, out, VISION, edit)


def transpose_swapped(bundle: Path, out: Path) -> Path:
    """Heads and their width change places where the heads are put together again."""

    def edit(model: onnx.ModelProto) -> None:
        known = {name: node for node in model.graph.node for name in node.output}
        last = next(node for node in model.graph.node if "out_proj.weight" in " ".join(node.input))
        transpose = known[known[last.input[0]].input[0]]
        assert transpose.op_type == "Transpose"
        transpose.attribute[0].CopyFrom(helper.make_attribute("perm", [0, 2, 3, 1]))

    return rewrite_graph(bundle, out, VISION, edit)


def weight_transposed(bundle: Path, out: Path) -> Path:
    """A square weight."""
    name = "layers.1.self_attn.q_proj.weight"
    return rewrite_weight(bundle, out, DECODER, name, lambda weight: weight.T)


def weight_zeroed(bundle: Path, out: Path) -> Path:
    """One that has a part in everything."""
    return rewrite_weight(bundle, out, DECODER, "layers.0.mlp.down_proj.weight", np.zeros_like)


def activations_overflow(bundle: Path, out: Path) -> Path:
    """A weight that float16 holds, and whose products with anything it does not."""
    name = "layers.0.mlp.up_proj.weight"
    return rewrite_weight(bundle, out, DECODER, name, lambda weight: weight * 2.0**15)


def color_order(bundle: Path, out: Path) -> Path:
    """The tower reads BGR."""
    name = "tower.embeddings.patch_embedding.weight"
    return rewrite_weight(bundle, out, VISION, name, lambda weight: weight[:, ::-1])


def mean_of_other_colors(bundle: Path, out: Path) -> Path:
    """Images are normalized by blue's mean and deviation where red's are due, and so on."""

    def edit(manifest: Manifest) -> Manifest:
        image = manifest.image
        return replace(manifest, image=replace(image, mean=image.mean[::-1], std=image.std[::-1]))

    return rewrite(bundle, out, edit_manifest=edit)


# Each fault with the first level that must fail, in the order of the table that the check is judged
# by; those of float16 need such a bundle, and ids above 2048 a model that knows as many.
#
# An id that is one too large everywhere changes no difference of ids, which is all that attention
# sees; how an image is prepared is no output of a graph, and is compared with recipe and checkpoint
# beside the tensors.
MUTANTS: Mapping[str, tuple[Mutant, Level]] = {
    "GAP node removed": (gap_node_removed, "positions"),
    "kept_positions read off by one": (neighbour_in_table, "positions"),
    "kept_positions one too large": (table_off_by_one, "positions"),
    "decode offset lost": (decode_offset_lost, "positions"),
    "rows and columns swapped": (rows_and_columns_swapped, "tensor"),
    "heads and width swapped": (transpose_swapped, "tensor"),
    "keys rotated with fp16 ids": (keys_with_half_ids, "positions"),
    "weight transposed": (weight_transposed, "tensor"),
    "weight zeroed": (weight_zeroed, "tensor"),
    "fp16 overflow": (activations_overflow, "tensor"),
    "wrong color order": (color_order, "tensor"),
    "mean and deviation of other colors": (mean_of_other_colors, "tensor"),
    "compact positions": (compact_positions, "positions"),
}


def with_long_context(bundle: Path, out: Path) -> Path:
    """The same graphs of a model that knows 4096 positions, beyond what float16 counts."""

    def edit(manifest: Manifest) -> Manifest:
        return replace(manifest, decoder=replace(manifest.decoder, max_position_embeddings=4096))

    return rewrite(bundle, out, edit_manifest=edit)


def checkpoint_with_long_context(checkpoint: Path, out: Path) -> Path:
    """The checkpoint that such bundles are of."""
    shutil.copytree(checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096
    (out / "config.json").write_text(json.dumps(config))
    return out


def rewrite(
    bundle: Path,
    out: Path,
    *,
    edit_folder: Callable[[Path], None] = lambda folder: None,
    edit_manifest: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Path:
    """Copy a bundle, change it, and put its manifest and hashes in order."""
    opened = open_bundle(bundle)
    with write_bundle(out) as draft:
        for file in opened.manifest.files:
            target = draft.folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            # A link would be to the honest bundle's own weights.
            shutil.copyfile(opened.file(file.path), target)
        edit_folder(draft.folder)
        assert not any((draft.folder / name).exists() for name in (MANIFEST_NAME, HASH_NAME))
        draft.commit(edit_manifest(opened.manifest))
    return out


def rewrite_graph(bundle: Path, out: Path, component: str, edit: GraphEdit) -> Path:
    """A bundle with another base graph."""

    def edit_folder(folder: Path) -> None:
        path = folder / open_bundle(bundle).manifest.graph(component).file
        path.write_bytes(edited(path, edit))

    return rewrite(bundle, out, edit_folder=edit_folder)


def rewrite_weight(bundle: Path, out: Path, component: str, name: str, edit: WeightEdit) -> Path:
    """A bundle with other values of a weight, in the place where the weight lies."""
    file = open_bundle(bundle).manifest.graph(component).file
    return rewrite(bundle, out, edit_folder=partial(_edit_weight, file=file, name=name, edit=edit))


def _edit_weight(folder: Path, *, file: str, name: str, edit: WeightEdit) -> None:
    model = onnx.load(folder / file, load_external_data=False)
    (proto,) = (one for one in model.graph.initializer if one.name == name)
    place = {entry.key: entry.value for entry in proto.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(proto.data_type)
    offset, shape = int(place["offset"]), tuple(proto.dims)
    held = np.memmap(folder / place["location"], dtype, mode="r+", offset=offset, shape=shape)
    changed = edit(np.array(held, np.float32)).astype(dtype)
    assert np.isfinite(changed).all() and not np.array_equal(changed, held)
    held[...] = changed.reshape(shape)
    held.flush()


def edited(path: Path, edit: GraphEdit) -> bytes:
    """An ONNX file with its structure changed; weights stay where they are."""
    model = onnx.load(path, load_external_data=False)
    before = model.SerializeToString()
    edit(model)
    after: bytes = model.SerializeToString()
    assert after != before
    return after


def gap_node(model: onnx.ModelProto) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if node.op_type == "GapRemap")
    return node


def function_node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    """The node of the GapRemap function that is that operator."""
    (node,) = (node for node in model.functions[0].node if node.op_type == op_type)
    return node


def rewire(model: onnx.ModelProto, old: str, new: str) -> None:
    """Have all who read a value read another."""
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def add_constant(model: onnx.ModelProto, name: str, values: NDArray[Any]) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))


def insert_before_gap(
    model: onnx.ModelProto, steps: list[tuple[str, list[str], str, dict[str, Any]]]
) -> None:
    """Work on the table before the node reads it."""
    gap = gap_node(model)
    gap.input[1] = steps[-1][2]
    for op_type, inputs, output, attributes in reversed(steps):
        node = helper.make_node(op_type, inputs, [output], output, **attributes)
        model.graph.node.insert(0, node)


def above(model: onnx.ModelProto, value: str) -> set[str]:
    """Names of all that has a part in a value."""
    known = {name: node for node in model.graph.node for name in node.output}
    waiting, found = [value], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += known[name].input if name in known else []
    return found


def op_types_below(model: onnx.ModelProto, node: onnx.NodeProto) -> list[str]:
    """Operators of which a node's value is a part, as far as Cos and Sin."""
    return [
        other.op_type
        for other in model.graph.node
        if other.op_type in {"Cos", "Sin"} and node.output[0] in above(model, other.output[0])
    ]


def is_key(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether a node works on keys: of all projections the nearest above is that of keys."""
    known = {name: other for other in model.graph.node for name in other.output}
    waiting = list(node.input)
    while waiting:
        producer = known.get(waiting.pop(0))
        if producer is None:
            continue
        if producer.op_type == "Gemm":
            return any("k_proj" in name for name in producer.input)
        waiting += producer.input
    return False
