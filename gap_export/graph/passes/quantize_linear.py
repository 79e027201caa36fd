"""Has linear layers read their weights as blocked INT4, from where the bundle holds them so."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from gap_export.checkpoint.weights import PlacedTensor, QuantizedPlace
from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import add_initializer, graphs_of, new_value

# DequantizeLinear has blocks and INT4 from 21 on, ONNX files from IR version 10 on. All operators
# of opset 20 but GroupNormalization mean the same in 21, which only lets some take more types.
_OPSET, _FROM_OPSET = 21, 20
_MIN_IR_VERSION = 10
_CHANGED = "GroupNormalization"
_SAFETENSORS_NAMES: Mapping[ir.DataType | None, str] = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
}


class QuantizeLinear(GraphPass):
    """Rewrites ``Gemm(x, weight, transB=1)`` to a product with a dequantized weight.

    ``MatMul(x, DequantizeLinear(packed INT4 [K, N], scales [K / block, N], axis=0))``, and an Add
    where the Gemm has a bias. ONNX Runtime makes one MatMulNBits of it, TensorRT keeps the INT4
    values in its plan. The scales are of the dtype the weight had; it is no longer an initializer.

    Before an Add, be it of the bias or of a residual stream, comes a Reshape that changes nothing:
    ONNX Runtime would join product and sum to a Gemm before it looks for a dequantized weight, and
    then dequantize the whole weight at every step.

    To be run after FuseLinear, which makes the Gemms. Other weights, and layers that are not named,
    stay as they are. Does not handle: a Gemm with factors or a transposed first operand, a weight
    that anything else reads, and graphs of an opset below 20.

    Args:
        places: Where each weight lies, by the name of the initializer [N, K] of floats.
    """

    def __init__(self, places: Mapping[str, QuantizedPlace]) -> None:
        self._places = dict(places)

    def apply(self, model: ir.Model) -> bool:
        """Rewrite every named layer.

        Raises:
            PassError: one of them is not in the graph as what the pass handles, its weight is held
                with another shape or without scales of its dtype, or the graph's opset is too old.
        """
        if not self._places:
            return False
        found = {
            name: _find_layer(model.graph, name, place) for name, place in self._places.items()
        }
        _raise_opset(model)
        for name, gemm in found.items():
            _rewrite(model.graph, gemm, name, self._places[name])
        return True


def find_gemm(graph: ir.Graph, name: str, *, shape: tuple[int, ...]) -> ir.Node:
    """The Gemm that reads a weight.

    Args:
        graph: Behind FuseLinear.
        name: Of the initializer [N, K].
        shape: (K, N): in, out, as it is held.

    Raises:
        PassError: there is none that is a plain linear layer.
    """
    weight = graph.initializers.get(name)
    if weight is None:
        raise PassError(
            "a weight to quantize is not in the graph",
            seen=name,
            allowed="an initializer of that name that a Gemm reads",
            fix="run the pass on a graph whose weights have the checkpoint's names",
        )
    uses = list(weight.uses())
    if len(uses) != 1 or weight.is_graph_output() or not _is_linear(*uses[0]):
        readers = sorted(f"{node.op_type} {node.name}" for node, _ in uses)
        raise PassError(
            f"the weight {name} is not that of one linear layer",
            seen=f"read by {' and '.join(readers) or 'no node'}",
            allowed="the second operand of one Gemm with transB=1",
            fix="run FuseLinear before",
        )
    own = None if weight.shape is None else tuple(weight.shape)
    if own != shape[::-1]:
        raise PassError(
            f"the weight {name} is held with another shape",
            seen=f"(in, out) = {shape}",
            allowed=f"{own} transposed, as the graph has it",
        )
    return uses[0][0]


def _find_layer(graph: ir.Graph, name: str, place: QuantizedPlace) -> ir.Node:
    """The Gemm that reads a weight.

    Raises:
        PassError: there is none that the pass handles.
    """
    gemm = find_gemm(graph, name, shape=place.shape)
    weight = graph.initializers[name]
    if _SAFETENSORS_NAMES.get(weight.dtype) not in place.scales:
        raise PassError(
            f"there are no scales of the dtype of {weight.name}",
            seen=weight.dtype,
            allowed=", ".join(place.scales),
        )
    return gemm


def _is_linear(node: ir.Node, index: int) -> bool:
    if node.op_type != "Gemm" or node.domain != "" or index != 1:
        return False
    numbers = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    return {**plain, **numbers} == {**plain, "transB": 1}


def _raise_opset(model: ir.Model) -> None:
    """Have the operators of opset 21, where they are not newer.

    Raises:
        PassError: the model is older than 20, or holds an operator that 21 defines anew.
    """
    opset = model.opset_imports.get("")
    if opset is None or opset < _FROM_OPSET or model.ir_version < _MIN_IR_VERSION:
        raise PassError(
            "the model is too old for INT4 weights",
            seen=f"opset {opset}, IR version {model.ir_version}",
            allowed=f"opset >= {_FROM_OPSET}, IR version >= {_MIN_IR_VERSION}",
        )
    if opset >= _OPSET:
        return
    holders = graphs_of(model)
    changed = [node for holder in holders for node in holder if node.op_type == _CHANGED]
    if changed:
        raise PassError(
            f"opset {_OPSET} means something else by an operator of the graph",
            seen=f"{_CHANGED} {changed[0].name}",
        )
    # A function is inlined only where it is of its model's opset.
    for holder in (model, *holders):
        if "" in holder.opset_imports:
            holder.opset_imports[""] = _OPSET


def _rewrite(graph: ir.Graph, gemm: ir.Node, name: str, place: QuantizedPlace) -> None:
    weight = graph.initializers[name]
    scales = place.scales[_SAFETENSORS_NAMES[weight.dtype]]
    packed = external_initializer(
        graph, f"{name}.int4", place.packed, ir.DataType.INT4, place.shape
    )
    assert weight.dtype is not None
    factors = external_initializer(graph, f"{name}.scales", scales, weight.dtype, scales.shape)
    floats = new_value(f"{name}.dequantized", weight.dtype, ir.Shape(place.shape))
    blocks, label = {"axis": 0, "block_size": place.block_size}, f"{name}.dequantize"
    dequantize = ir.node(
        "DequantizeLinear", [packed, factors], blocks, outputs=[floats], name=label
    )
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    old = gemm.outputs[0]
    product = ir.Node("", "MatMul", [gemm.inputs[0], floats], name=gemm.name or f"{name}.product")
    nodes = [dequantize, product]
    if bias is not None or any(user.op_type == "Add" for user, _ in old.uses()):
        # A Reshape of [rows, width] to what it is.
        width = place.shape[1]
        shape = add_initializer(graph, f"rows_of_{width}", np.array([-1, width]))
        apart = [product.outputs[0], shape]
        nodes.append(ir.Node("", "Reshape", apart, name=f"{product.name}.apart"))
    if bias is not None:
        nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], bias], name=f"{name}.add_bias"))
    for node in nodes[1:]:
        node.outputs[0].type, node.outputs[0].shape = old.type, old.shape
        node.outputs[0].name = f"{node.name}.result"
    new = nodes[-1].outputs[0]
    new.name = old.name
    for node in nodes:
        node.metadata_props.update(gemm.metadata_props)
    graph.insert_before(gemm, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(gemm, safe=True)
    del graph.initializers[name]


def external_initializer(
    graph: ir.Graph, name: str, place: PlacedTensor, dtype: ir.DataType, shape: tuple[int, ...]
) -> ir.Value:
    """A weight of the graph that lies in a file of the bundle."""
    dims = ir.Shape(shape)
    tensor = ir.ExternalTensor(
        location=place.location,
        offset=place.offset,
        length=place.length,
        dtype=dtype,
        shape=dims,
        name=name,
    )
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=dims, const_value=tensor)
    graph.register_initializer(value)
    return value
