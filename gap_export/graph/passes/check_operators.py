"""Refuses a graph that uses more than a lowering promises."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.matching import all_nodes, qualified_name


def check_operators(
    model: ir.Model, *, lowering: str, operators: Collection[str], max_opset: int
) -> None:
    """Look at every node of the graph, of its loops and of its functions; types are not looked at.

    Args:
        model: A lowered graph.
        lowering: Name of the lowering, for the message.
        operators: The operators it may use: standard ones by name, others as ``domain::name``.
        max_opset: Highest opset it may declare.

    Raises:
        PassError: an operator is not in the list, calls a function that the model has not got, or
            the opset is too new.
    """
    opset = model.opset_imports.get("")
    if opset is None or opset > max_opset:
        raise PassError(
            f"the opset is not one of the {lowering} form", seen=opset, allowed=f"<= {max_opset}"
        )
    for node in all_nodes(model):
        is_ours = node.domain != "" and node.op_identifier() in model.functions
        if not is_ours and qualified_name(node) not in operators:
            raise PassError(
                f"the {lowering} form has no such operator",
                seen=f"{node.domain or 'standard'} {node.op_type}, node {node.name}",
                allowed=", ".join(sorted(operators)),
            )
