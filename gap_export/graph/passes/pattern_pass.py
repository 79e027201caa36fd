"""Passes that replace a pattern of nodes by one node, written with onnxscript's patterns."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.optimizer import basic_constant_propagation
from onnxscript.rewriter.pattern import RewriteRule

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import take_place


class PatternPass(GraphPass):
    """Replaces the last node of each match; nodes that nothing reads any more are removed after.

    The operands of Add and Mul may stand in either order. A structure that resembles the pattern
    but does not match is an error, never left behind in silence: see :meth:`is_left`.
    """

    @abstractmethod
    def pattern(self, *args: Any, **values: Any) -> Any:
        """The nodes to look for: a function of the rewriter's ``op`` and of values to be named."""

    @abstractmethod
    def replace(self, last: ir.Node, **values: Any) -> ir.Node | None:
        """The node for the place of ``last``, or None to leave it; may insert more before it.

        Raises:
            PassError: the nodes match, and what they compute is still something else.
        """

    def is_left(self, node: ir.Node) -> bool:
        """Whether a node shows, after all matches are replaced, that one was missed."""
        del node
        return False

    def apply(self, model: ir.Model) -> bool:
        """Replace; True if there was a match.

        Raises:
            PassError: something resembles the pattern and does not match it.
        """
        graph, modified = model.graph, False
        basic_constant_propagation(graph)  # lets patterns hold numbers
        rules = RewriteRule(self.pattern, lambda _: None).commute()
        for node in list(graph):
            for rule in rules:
                match = rule.match(model, graph, node, check_nodes_are_removable=False)
                new = self.replace(node, **match.bindings) if match else None
                if new is not None:
                    take_place(graph, node, new)
                    modified = True
                    break
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        left = [f"{node.op_type} {node.name}" for node in graph if self.is_left(node)]
        if left:
            raise PassError(
                f"{type(self).__name__}: {len(left)} places resemble the pattern and do not match "
                "it",
                seen=", ".join(left[:3]) + (", ..." if len(left) > 3 else ""),
                fix="use the portable lowering",
            )
        return modified
