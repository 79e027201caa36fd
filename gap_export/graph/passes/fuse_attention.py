"""Makes the nodes of scaled dot-product attention one Attention (opset 23, 24)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import OrValue, Var

from gap_export.errors import PassError
from gap_export.graph.passes.matching import (
    HALF,
    add_initializer,
    constant,
    describe,
    is_operator,
    like,
    new_value,
    static_dim,
)
from gap_export.graph.passes.pattern_pass import PatternPass

# What TensorRT has kernels for.
_WIDTHS = range(16, 257, 8)


class FuseAttention(PatternPass):
    """Rewrites ``softmax(q k' * scale + bias) v`` to ``Attention(q, k, v, bias)``.

    The bias is ``where(allowed, 0, lowest)`` in float32, or with proportional attention
    ``where(allowed, log(attention_mask), lowest)``. It is optional, and so is the repetition
    of key-value heads: Attention shares them by itself, query head h reads head h // groups.
    TensorRT wants the bias in the query's dtype, of four axes and, where a row may have nothing
    that is allowed (padding), finite; -inf would give NaN and spread. It becomes half of that
    dtype's lowest number rather than the lowest, since the sum must not overflow: next to any key
    that is allowed its weight is 0 just the same. Where nothing is allowed, a row comes out as
    another mean than before; no such row is read.

    What marks attention is a Softmax whose result is multiplied as a matrix and read by nothing
    else; where something else reads the weights (a pruner reads those of [CLS]) they stay. Does not
    handle: graphs in float32, for which TensorRT has no kernel; head widths but multiples of 8 from
    16 to 256; dropout; biases of other numbers.
    """

    def __init__(self) -> None:
        # By the mask and the number of queries: layers of one mask share one bias. Filled anew by
        # each run.
        self._biases: dict[tuple[ir.Value, int | None], ir.Value] = {}

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was attention to rewrite."""
        self._biases.clear()
        return super().apply(model)

    def pattern(self, op: Any, query: Any, key: Any, value: Any, scale: Any) -> Any:
        """Attention of query [B, heads, S, d], key and value [B, heads, T, d]."""
        product = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
        scores = op.Mul(product, scale)
        # The rewriter cannot commute alternatives without a tag.
        wide = OrValue([op.Cast(scores), scores], tag_var="stays_wide")
        masked = op.Add(wide, Var("bias"))
        weights = op.Softmax(OrValue([masked, wide], tag_var="is_plain"), _outputs=["weights"])
        return op.MatMul(OrValue([op.Cast(weights), weights], tag_var="stays_narrow"), value)

    def replace(self, last: ir.Node, **values: Any) -> ir.Node | None:
        """One Attention, behind the bias of its mask."""
        softmax, bias = values["weights"].producer(), values.get("bias")
        if last_product(softmax) is not last:
            return None  # something else reads the weights
        query, key, value = (values[name] for name in ("query", "key", "value"))
        where = f"attention at {softmax.name}"
        axis, scale = softmax.attributes.get_int("axis", -1), constant(values["scale"])
        if axis not in {-1, 3}:
            raise PassError(f"{where}: softmax not over the keys", seen=axis, allowed="-1")
        if scale is None or scale.size != 1:
            raise PassError(f"{where}: the scale is not one number", seen=describe(values["scale"]))
        for part in (query, key, value):
            width, rank = static_dim(part, 3), None if part.shape is None else part.shape.rank()
            if part.dtype not in HALF or rank != 4 or width not in _WIDTHS:
                raise PassError(
                    f"{where}: TensorRT has no fused kernel for such heads",
                    seen=f"{part.name}, {part.dtype} {part.shape}",
                    allowed="FLOAT16 or BFLOAT16 of four axes, width a multiple of "
                    f"{_WIDTHS.step} from {_WIDTHS[0]} to {_WIDTHS[-1]}",
                    fix="use the portable lowering",
                )
        inputs = [query, shared_heads(key, where), shared_heads(value, where)]
        if bias is not None:
            inputs.append(self._bias(bias, query, where))
        factor, made = float(scale.reshape(())), [like(last.outputs[0])]
        return ir.node("Attention", inputs, {"scale": factor}, outputs=made, name=last.name)

    def is_left(self, node: ir.Node) -> bool:
        """A Softmax whose result is multiplied as a matrix and read by nothing else."""
        return last_product(node) is not None

    def _bias(self, wide: ir.Value, query: ir.Value, where: str) -> ir.Value:
        """0 where a key is allowed, half of the lowest number elsewhere; four axes.

        A mask that is the same for all queries is repeated for each: not every runtime does so.
        """
        mask = wide.producer()
        if mask is None or not is_operator(mask, "Where"):
            raise PassError(
                f"{where}: a bias that is no mask", seen=describe(wide), allowed="Where"
            )
        graph, (allowed, added, blocked) = mask.graph, mask.inputs
        assert allowed is not None and query.dtype is not None and isinstance(graph, ir.Graph)
        dtype, length = query.dtype, static_dim(query, 2)
        is_shared = length != 1 and static_dim(allowed, -2) == 1
        key = allowed, length if is_shared else None
        if key in self._biases:
            return self._biases[key]
        rank, number = None if allowed.shape is None else allowed.shape.rank(), constant(blocked)
        lowest = None if number is None else ir.DataType.from_numpy(number.dtype).min
        is_known = number is not None and number.size == 1 and number.item() == lowest
        counts = added if is_log_of_mask(added) else None
        is_known = is_known and (counts is not None or constant(added) == 0)
        if rank not in {2, 4} or not is_known or (is_shared and length is None):
            raise PassError(
                f"{where}: masked in another way",
                seen=f"{describe(allowed)} of {rank} axes, {constant(added)} or {number}, {length} "
                "queries",
                allowed="2 or 4 axes, 0 or the lowest number there is; a mask that is the same "
                "for all queries, where their number is known",
            )
        assert allowed.shape is not None
        kind, name = dtype.numpy(), f"{mask.name}.bias"
        zero = add_initializer(graph, "attention.allowed", np.array(0, kind))
        low = add_initializer(graph, "attention.blocked", np.array(float(dtype.min) / 2, kind))
        out = new_value(f"{allowed.name}.bias", dtype, allowed.shape)
        nodes: list[ir.Node] = []
        if counts is not None:
            zero = new_value(f"{name}.counts", dtype, counts.shape)
            nodes.append(ir.node("Cast", [counts], {"to": dtype.value}, outputs=[zero]))
        nodes.append(ir.Node("", "Where", [allowed, zero, low], outputs=[out], name=name))
        if rank == 2:
            axes = add_initializer(graph, "attention.axes", np.array([0, 1]))
            wide = new_value(f"{out.name}.wide", dtype, ir.Shape([1, 1, *allowed.shape]))
            node = ir.Node("", "Unsqueeze", [out, axes], outputs=[wide], name=f"{name}.wide")
            nodes.append(node)
            out = wide
        if is_shared:
            each = add_initializer(graph, f"{name}.shape", np.array([1, 1, length, 1]))
            dims = [length if axis == 2 else dim for axis, dim in enumerate(out.shape or ())]
            repeated = new_value(f"{out.name}.repeated", dtype, ir.Shape(dims))
            node = ir.Node("", "Expand", [out, each], outputs=[repeated], name=f"{name}.repeated")
            nodes.append(node)
            out = repeated
        graph.insert_before(mask, nodes)
        self._biases[key] = out
        return out


def last_product(softmax: ir.Node) -> ir.Node | None:
    """The product of weights and values; None where that is not all that reads the weights."""
    if not is_operator(softmax, "Softmax"):
        return None
    value = softmax.outputs[0]
    while True:
        readers = value.uses()
        if len(readers) != 1 or value.is_graph_output():
            return None
        node, index = next(iter(readers))
        if is_operator(node, "MatMul") and index == 0:
            return node
        if not is_operator(node, "Cast"):
            return None
        value = node.outputs[0]


def is_log_of_mask(value: ir.Value | None) -> bool:
    """Whether it is ``log(max(attention_mask, 1))``, what proportional attention adds to scores."""
    chain = ("Unsqueeze", "Unsqueeze", "Log", "Cast")
    for kind in chain:
        node = None if value is None else value.producer()
        if node is None or not is_operator(node, kind):
            return False
        value = node.inputs[0]
    node = None if value is None else value.producer()
    if node is None or not (is_operator(node, "Max") or is_operator(node, "Clip")):
        return False
    mask, least = node.inputs[:2]
    return mask is not None and mask.name == "attention_mask" and constant(least) == 1


def shared_heads(heads: ir.Value, where: str) -> ir.Value:
    """Key-value heads before they are repeated; the same where they are not."""
    chain: list[ir.Node] = []
    value: ir.Value | None = heads
    for kind in ("Reshape", "Expand", "Unsqueeze"):
        node = None if value is None else value.producer()
        if node is None or not is_operator(node, kind):
            break
        chain.append(node)
        value = node.inputs[0]
    if len(chain) < 2:
        return heads  # a Reshape alone repeats nothing: windows of an image come from one
    axes = constant(chain[-1].inputs[1])
    few = None if value is None else static_dim(value, 1)
    many = static_dim(heads, 1)
    groups = static_dim(chain[1].outputs[0], 2) if len(chain) > 1 else None
    repeats = few is not None and groups is not None and many == few * groups
    if value is None or len(chain) < 3 or axes is None or axes.tolist() != [2] or not repeats:
        raise PassError(
            f"{where}: repeated heads",
            seen=f"{' of '.join(node.op_type for node in chain)}, axes {axes}, {few} heads, "
            f"{groups} of each, {many} in all",
            allowed="each head several times, one after another",
        )
    return value
