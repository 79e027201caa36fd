"""Makes the nodes of scaled dot-product attention one Attention (opset 23, 24)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import (
    add_initializer,
    constant,
    describe,
    is_operator,
    like,
    new_value,
    other_input,
    require_constant,
    require_producer,
    static_dim,
    take_place,
)

_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# What TensorRT has kernels for.
_MIN_WIDTH, _MAX_WIDTH, _WIDTH_STEP = 16, 256, 8


class FuseAttention(GraphPass):
    """Rewrites ``softmax(where(allowed, q k' * scale, lowest)) v`` to ``Attention(q, k, v, bias)``.

    ``allowed`` is optional, and so is the repetition of key-value heads: Attention shares them by
    itself, query head h reading head h // groups. TensorRT wants four axes and, where a row may
    have nothing that is allowed (padding), a bias that is finite; -inf would give NaN and spread.
    The bias is half of the lowest number rather than the lowest, since it is added to the score
    and must not overflow: next to any key that is allowed its weight is 0 just the same. Where
    nothing is allowed, a row comes out as another mean than before; nobody reads such a row.

    What marks attention is a Softmax whose result is multiplied as a matrix. One whose weights are
    read by somebody else (a pruner reads those of [CLS]) stays as it is; of the others each must
    fit, or none is rewritten. Does not handle: graphs in float32, for which TensorRT has no
    kernel; head widths but multiples of 8 from 16 to 256; dropout; biases that are added.
    """

    name: ClassVar[str] = "FuseAttention"

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was attention to rewrite.

        Raises:
            PassError: a Softmax that marks attention is not part of what the pass handles.
        """
        graph = model.graph
        marked = [(node, last) for node in graph if (last := _last_of(node)) is not None]
        for node, last in marked:
            _match(node, last)
        biases: dict[ir.Value, ir.Value] = {}
        for node, last in marked:
            # Once more: what one reads may be what another has given and gives no longer.
            _rewrite(graph, _match(node, last), biases)
        if marked:
            common_passes.RemoveUnusedNodesPass()(model)
        return bool(marked)


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """``query`` [B, heads, S, d], ``key`` and ``value`` [B, key-value heads, T, d]."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    masking: ir.Node | None
    last: ir.Node


def _last_of(softmax: ir.Node) -> ir.Node | None:
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


def _match(softmax: ir.Node, last: ir.Node) -> _Attention:
    where = f"attention at {softmax.name}"
    axis = softmax.attributes.get("axis")
    if axis is not None and axis.as_int() not in {-1, 3}:
        raise PassError(f"{where}: softmax not over the keys", seen=axis.as_int(), allowed="-1")
    scores = softmax.inputs[0]
    if scores is not None and is_operator(scores.producer(), "Cast"):
        scores = require_producer(scores, "Cast", part=where).inputs[0]
    masking = None
    if scores is not None and is_operator(scores.producer(), "Where"):
        masking = require_producer(scores, "Where", part=where)
        _check_masking(masking, where)
        scores = masking.inputs[1]
    scaled = require_producer(scores, "Mul", part=f"{where}: the scaled scores")
    product = scaled.inputs[0]
    if constant(product) is not None:
        product = scaled.inputs[1]
    scale = require_constant(other_input(scaled, product), part=f"{where}: the scale")
    if scale.size != 1:
        raise PassError(f"{where}: the scale is not one number", seen=list(scale.shape))
    matmul = require_producer(product, "MatMul", part=f"{where}: the scores")
    turned = require_producer(matmul.inputs[1], "Transpose", part=f"{where}: the keys, transposed")
    perm = turned.attributes.get("perm")
    if perm is None or list(perm.as_ints()) != [0, 1, 3, 2]:
        raise PassError(f"{where}: the keys are transposed otherwise", seen=perm)
    query, key, value = matmul.inputs[0], turned.inputs[0], last.inputs[1]
    assert query is not None and key is not None and value is not None
    _check_heads(query, key, value, where)
    return _Attention(
        query=query,
        key=_shared(key, where),
        value=_shared(value, where),
        scale=float(scale.reshape(())),
        masking=masking,
        last=last,
    )


def _check_masking(masking: ir.Node, where: str) -> None:
    allowed, scores, blocked = masking.inputs
    assert allowed is not None and scores is not None
    rank = None if allowed.shape is None else allowed.shape.rank()
    number = require_constant(blocked, part=f"{where}: what blocked scores become")
    lowest = ir.DataType.from_numpy(number.dtype).min
    if rank not in {2, 4} or number.size != 1 or number.reshape(()) != lowest:
        raise PassError(
            f"{where}: masked in another way",
            seen=f"{describe(allowed)} of {rank} axes, blocked {number}",
            allowed=f"2 or 4 axes, blocked {lowest}",
        )


def _check_heads(query: ir.Value, key: ir.Value, value: ir.Value, where: str) -> None:
    for part in (query, key, value):
        width = static_dim(part, 3)
        fits = width is not None and _MIN_WIDTH <= width <= _MAX_WIDTH and width % _WIDTH_STEP == 0
        if part.dtype not in _HALF or part.shape is None or part.shape.rank() != 4 or not fits:
            raise PassError(
                f"{where}: TensorRT has no fused kernel for such heads",
                seen=f"{part.name}, {part.dtype} {part.shape}",
                allowed=f"FLOAT16 or BFLOAT16 of four axes, width a multiple of {_WIDTH_STEP} "
                f"from {_MIN_WIDTH} to {_MAX_WIDTH}",
                fix="use the portable lowering",
            )


def _shared(heads: ir.Value, where: str) -> ir.Value:
    """Key-value heads before they are repeated; the same where they are not."""
    if not is_operator(heads.producer(), "Reshape"):
        return heads
    part = f"{where}: repeated heads"
    reshape = require_producer(heads, "Reshape", part=part)
    expand = require_producer(reshape.inputs[0], "Expand", part=part)
    unsqueeze = require_producer(expand.inputs[0], "Unsqueeze", part=part)
    axes = require_constant(unsqueeze.inputs[1], part=part).tolist()
    shared = unsqueeze.inputs[0]
    assert shared is not None
    wide = expand.outputs[0]
    few, many = static_dim(shared, 1), static_dim(heads, 1)
    groups = static_dim(wide, 2)
    if axes != [2] or few is None or groups is None or many != few * groups:
        raise PassError(
            part,
            seen=f"axes {axes}, {few} heads, {groups} of each, {many} in all",
            allowed="each head several times, one after another",
        )
    return shared


def _rewrite(graph: ir.Graph, attention: _Attention, biases: dict[ir.Value, ir.Value]) -> None:
    last = attention.last
    inputs = [attention.query, attention.key, attention.value]
    if attention.masking is not None:
        allowed = attention.masking.inputs[0]
        assert allowed is not None
        if allowed not in biases:
            biases[allowed] = _insert_bias(graph, attention.masking, attention.query.dtype)
        inputs.append(biases[allowed])
    node = ir.Node(
        "",
        "Attention",
        inputs,
        [ir.AttrFloat32("scale", attention.scale)],
        outputs=[like(last.outputs[0])],
        name=last.name,
    )
    take_place(graph, last, node)


def _insert_bias(graph: ir.Graph, masking: ir.Node, dtype: ir.DataType | None) -> ir.Value:
    """0 where a key is allowed, half of the lowest number elsewhere; four axes."""
    allowed = masking.inputs[0]
    assert allowed is not None and allowed.shape is not None and dtype is not None
    kind = dtype.numpy()
    zero = add_initializer(graph, "attention.allowed", np.array(0, kind))
    blocked = add_initializer(graph, "attention.blocked", np.array(float(dtype.min) / 2, kind))
    out = new_value(f"{allowed.name}.bias", dtype, allowed.shape)
    name = f"{masking.name}.bias"
    nodes = [ir.Node("", "Where", [allowed, zero, blocked], outputs=[out], name=name)]
    if allowed.shape.rank() == 2:
        axes = add_initializer(graph, "attention.axes", np.array([0, 1]))
        wide = new_value(f"{out.name}.wide", dtype, ir.Shape([1, 1, *allowed.shape]))
        node = ir.Node("", "Unsqueeze", [out, axes], outputs=[wide], name=f"{name}.wide")
        nodes.append(node)
        out = wide
    graph.insert_before(masking, nodes)
    return out
