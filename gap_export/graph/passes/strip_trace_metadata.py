"""Removes what the tracer wrote about the machine and code it ran on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import onnx_ir as ir

from gap_export.graph.passes.graph_pass import GraphPass


class StripTraceMetadata(GraphPass):
    """Clears metadata and doc strings of the model, its graphs, functions, nodes and values.

    torch notes stack traces with absolute paths at every node, those of a loop's body included: a
    bundle would tell where it was made, and differ from machine to machine. Does not touch names.
    """

    name: ClassVar[str] = "StripTraceMetadata"

    def apply(self, model: ir.Model) -> bool:
        """Clear; True if there was anything."""
        modified = False
        graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        holders = [model, *(part for graph in graphs for part in _parts(graph))]
        for holder in (*holders, *model.graph.initializers.values()):
            if holder.metadata_props:
                holder.metadata_props.clear()
                modified = True
            if getattr(holder, "doc_string", None):
                holder.doc_string = None
                modified = True
        return modified


def _parts(graph: ir.Graph | ir.Function) -> Iterator[Any]:
    """The graph, its inputs, nodes and values, and those of graphs within nodes."""
    yield graph
    yield from graph.inputs
    for node in graph:
        yield node
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _parts(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for inner in attribute.as_graphs():
                    yield from _parts(inner)
