"""Removes what the tracer wrote about the machine and code it ran on."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import graphs_of


class StripTraceMetadata(GraphPass):
    """Clears metadata and doc strings of the model, its graphs, functions, nodes and values.

    torch notes stack traces with absolute paths at every node, those of a loop's body included: a
    bundle would tell where it was made, and differ from machine to machine. Does not touch names.
    """

    def apply(self, model: ir.Model) -> bool:
        """Clear; True if there was anything."""
        graphs = graphs_of(model)
        graphs += [inner for graph in graphs for inner in graph.subgraphs()]
        holders: list[Any] = [model, *model.graph.initializers.values()]
        for graph in graphs:
            holders += [graph, *graph.inputs]
            holders += [part for node in graph for part in (node, *node.outputs)]
        modified = False
        for holder in holders:
            if holder.metadata_props:
                holder.metadata_props.clear()
                modified = True
            if getattr(holder, "doc_string", None):
                holder.doc_string = None
                modified = True
        return modified
