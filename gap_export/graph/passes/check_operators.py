"""Refuses a graph that uses more than a lowering promises."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass


class CheckOperators(GraphPass):
    """Changes nothing; looks at every node of the graph and of its functions.

    Args:
        lowering: Name of the lowering, for the message.
        operators: The standard operators it may use.
        max_opset: Highest opset it may declare.

    Does not look at types: those are the parser's business.
    """

    name: ClassVar[str] = "CheckOperators"

    def __init__(self, *, lowering: str, operators: Collection[str], max_opset: int) -> None:
        self._lowering = lowering
        self._operators = frozenset(operators)
        self._max_opset = max_opset

    def apply(self, model: ir.Model) -> bool:
        """Look.

        Raises:
            PassError: an operator is not in the list, calls a function that the model has not got,
                or the opset is too new.
        """
        opset = model.opset_imports.get("")
        if opset is None or opset > self._max_opset:
            raise PassError(
                f"the opset is not one of the {self._lowering} form",
                seen=opset,
                allowed=f"<= {self._max_opset}",
            )
        graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        for graph in graphs:
            # Those of a loop's body as well.
            for node in graph.all_nodes():
                known = (
                    node.op_type in self._operators
                    if node.domain == ""
                    else node.op_identifier() in model.functions
                )
                if not known:
                    raise PassError(
                        f"the {self._lowering} form has no such operator",
                        seen=f"{node.domain or 'standard'} {node.op_type}, node {node.name}",
                        allowed=", ".join(sorted(self._operators)),
                    )
        return False
