"""How many multiply-adds the products of a graph are: MatMul, Gemm and Conv, from their shapes."""

from __future__ import annotations

import math
import re

import onnx_ir as ir

_SYMBOL = re.compile(r"[A-Za-z_]\w*(?: *\+ *[A-Za-z_]\w*)*")


def count_multiply_adds(graph: ir.Graph, *, length: int | None = None) -> int:
    """Multiply-adds of all products in a graph, and in the loops within it, for one row.

    Sizes that a graph leaves open are those of a batch, which is one here, and in a decoder those
    of the prompt, which prefill reads from an empty cache: of its sizes one in each product is the
    batch's.

    Args:
        graph: Its values have shapes, as those that are traced here have.
        length: Tokens of a decoder's prompt; None for a graph that reads none.
    """
    total = 0
    for node in graph:
        if node.op_type == "Scan":
            turns, _ = _size_of(_dims(node.inputs[-1])[0])
            total += turns * count_multiply_adds(node.attributes["body"].as_graph())
            continue
        dims = _dims_of_product(node)
        if dims is None:
            continue
        sizes = [_size_of(dim) for dim in dims]
        numbers = math.prod(size for size, _ in sizes)
        num_open = sum(symbols for _, symbols in sizes)
        total += numbers * (1 if length is None else length ** (num_open - 1))
    return total


def _dims_of_product(node: ir.Node) -> list[int | ir.SymbolicDim] | None:
    """Dimensions whose product is the number of multiply-adds; None of any other node."""
    if node.op_type == "MatMul":
        return [*_dims(node.outputs[0]), _dims(node.inputs[0])[-1]]
    if node.op_type == "Gemm":
        flipped = "transA" in node.attributes and node.attributes["transA"].as_int()
        return [*_dims(node.outputs[0]), _dims(node.inputs[0])[0 if flipped else 1]]
    if node.op_type == "Conv":
        return [*_dims(node.outputs[0]), *_dims(node.inputs[1])[1:]]
    return None


def _dims(value: ir.Value | None) -> list[int | ir.SymbolicDim]:
    assert value is not None and value.shape is not None, f"no shape of {value}"
    return list(value.shape)


def _size_of(dim: int | ir.SymbolicDim) -> tuple[int, int]:
    """A dimension as a number times so many open sizes; a sum of open sizes is one."""
    if isinstance(dim, int):
        return dim, 0
    plain, symbols = _SYMBOL.subn("1", str(dim.value))
    factors = plain.replace("(", "").replace(")", "").split("*")
    assert all(factor.strip().isdigit() for factor in factors), f"a size that is not known: {dim}"
    return math.prod(int(factor) for factor in factors), symbols
