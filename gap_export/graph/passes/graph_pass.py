"""The contract of a graph pass, checked for every pass on every run."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import onnx_ir as ir

from gap_export.errors import PassError


class GraphPass(ABC):
    """Changes a model in place: one file, one transformation.

    A subclass implements :meth:`apply`. It returns whether it changed anything and raises
    PassError, saying what it looked for and what it saw, where it declines.
    """

    @abstractmethod
    def apply(self, model: ir.Model) -> bool:
        """Transform; True exactly if the model changed."""

    def run(self, model: ir.Model) -> bool:
        """Apply the pass and hold it to what it says.

        Returns:
            Whether the model changed.

        Raises:
            PassError: the pass declined, or claimed the opposite of what it did.
        """
        before = fingerprint(model)
        modified = self.apply(model)
        changed = fingerprint(model) != before
        if changed != modified:
            raise PassError(
                f"pass {type(self).__name__} broke its contract",
                seen=f"it reported modified={modified} and the graph "
                + ("changed" if changed else "is the same"),
            )
        return modified


def fingerprint(model: ir.Model) -> str:
    """Digest of a model's structure; weights count by name, shape and place, not by their bytes."""
    digest = hashlib.sha256()
    for line in _describe(model):
        digest.update(line.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _describe(model: ir.Model) -> Iterator[str]:
    yield f"{model.ir_version} {sorted(model.opset_imports.items())}"
    yield f"{model.metadata_props} {model.doc_string}"
    yield from _describe_graph(model.graph)
    for function in model.functions.values():
        yield f"{function.identifier()} {sorted(function.opset_imports.items())}"
        yield from _describe_graph(function)


def _describe_graph(graph: ir.Graph | ir.Function) -> Iterator[str]:
    yield f"{graph.name} {graph.doc_string} {graph.metadata_props}"
    yield from (_describe_value(value) for value in graph.inputs)
    if isinstance(graph, ir.Graph):
        yield from (
            f"{_describe_value(value)} {_describe_tensor(value.const_value)}"
            for value in graph.initializers.values()
        )
    for node in graph:
        yield f"{node.domain} {node.op_type} {node.overload} {node.name} {node.metadata_props}"
        yield " ".join("" if value is None else str(value.name) for value in node.inputs)
        yield from (_describe_value(value) for value in node.outputs)
        for name, attribute in node.attributes.items():
            yield f"{name} {attribute.type}"
            if attribute.is_ref():
                yield f"ref {attribute.ref_attr_name}"
            elif attribute.type == ir.AttributeType.GRAPH:
                yield from _describe_graph(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for inner in attribute.as_graphs():
                    yield from _describe_graph(inner)
            elif attribute.type == ir.AttributeType.TENSOR:
                yield _describe_tensor(attribute.as_tensor())
            else:
                yield repr(attribute.value)
        yield str(node.doc_string)
    yield from (_describe_value(value) for value in graph.outputs)


def _describe_value(value: ir.Value) -> str:
    return f"{value.name} {value.type} {value.shape} {value.metadata_props}"


def _describe_tensor(tensor: ir.TensorProtocol | None) -> str:
    if isinstance(tensor, ir.ExternalTensor):
        return f"{tensor.location} {tensor.offset} {tensor.length} {tensor.dtype} {tensor.shape}"
    if tensor is None:
        return "no value"
    return f"{tensor.dtype} {tensor.shape} {hashlib.sha256(tensor.tobytes()).hexdigest()}"
