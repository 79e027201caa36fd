"""Has linear layers multiply 8-bit integers: weights as held, inputs rounded at each run."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from gap_export.checkpoint.weights import Int8Place
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import new_value
from gap_export.graph.passes.quantize_linear import external_initializer, find_gemm

_SCALAR = ir.Shape([])


class QuantizeDynamically(GraphPass):
    """Rewrites ``Gemm(x, weight, bias, transB=1)`` of float32 to a product of integers.

    ``DynamicQuantizeLinear(x)`` gives unsigned 8-bit integers between the smallest and the largest
    value of x, their scale and zero point; ``MatMulInteger`` of these and the weight [K, N] is cast
    and multiplied by both scales, and the bias is added. All are operators of opset 11. Layers that
    read one value share its rounding. ONNX Runtime makes one or two nodes of it.

    To be run after FuseLinear, which makes the Gemms. Other weights, and layers that are not named,
    stay as they are. Does not handle: floats of 16 bits, a Gemm with factors or a transposed first
    operand, a weight that anything else reads.

    Args:
        places: Where each weight lies, by the name of the initializer [N, K] of floats.
    """

    def __init__(self, places: Mapping[str, Int8Place]) -> None:
        self._places = dict(places)

    def apply(self, model: ir.Model) -> bool:
        """Rewrite every named layer.

        Raises:
            PassError: one of them is not in the graph as what the pass handles, or its weight is
                held with another shape.
        """
        found = {
            name: find_gemm(model.graph, name, shape=place.values.shape)
            for name, place in self._places.items()
        }
        rounded: dict[ir.Value, tuple[ir.Value, ...]] = {}
        for name, gemm in found.items():
            _rewrite(model.graph, gemm, name, self._places[name], rounded)
        return bool(found)


def _rewrite(
    graph: ir.Graph,
    gemm: ir.Node,
    name: str,
    place: Int8Place,
    rounded: dict[ir.Value, tuple[ir.Value, ...]],
) -> None:
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
        out = new_value(f"{name}.{op}", dtype, shape)
        nodes.append(ir.Node("", op, inputs, outputs=[out], name=f"{name}.{op}"))
        return out

    given, old = gemm.inputs[0], gemm.outputs[0]
    assert given is not None and given.name and old.shape is not None
    if given not in rounded:
        parts = (
            new_value(f"{given.name}.uint8", ir.DataType.UINT8, given.shape),
            new_value(f"{given.name}.scale", ir.DataType.FLOAT, _SCALAR),
            new_value(f"{given.name}.zero", ir.DataType.UINT8, _SCALAR),
        )
        label = f"{given.name}.quantize"
        nodes.append(ir.Node("", "DynamicQuantizeLinear", [given], outputs=parts, name=label))
        rounded[given] = parts
    values, scale, zero = rounded[given]
    weight = external_initializer(
        graph, f"{name}.int8", place.values, ir.DataType.INT8, place.values.shape
    )
    scales = external_initializer(
        graph, f"{name}.scales", place.scales, ir.DataType.FLOAT, place.scales.shape
    )
    sums = add("MatMulInteger", [values, weight, zero], ir.DataType.INT32, old.shape)
    floats = add("Cast", [sums], ir.DataType.FLOAT, old.shape)
    nodes[-1].attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    assert scales.shape is not None
    factors = add("Mul", [scale, scales], ir.DataType.FLOAT, scales.shape)
    nodes[-1].name = factors.name = f"{name}.factors"
    result = add("Mul", [floats, factors], ir.DataType.FLOAT, old.shape)
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        result = add("Add", [result, gemm.inputs[2]], ir.DataType.FLOAT, old.shape)
    for node in nodes:
        node.metadata_props.update(gemm.metadata_props)
    graph.insert_before(gemm, nodes)
    name_of_old = old.name
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(gemm, safe=True)
    result.name = name_of_old
    del graph.initializers[name]
