"""A parsed TensorRT network as plain data, for checks that need no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gap_export.engines.plan import EngineTensor
from gap_export.errors import EngineError
from gap_export.spec.manifest import GraphSpec, TensorSpec

# TensorRT's names of dtypes that differ from ours.
_DTYPES: Mapping[str, str] = MappingProxyType(
    {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8"}
)
# What a layer does, where its type says only half of it: the class to see it as, the attribute.
_OPERATIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "ELEMENTWISE": ("IElementWiseLayer", "op"),
        "UNARY": ("IUnaryLayer", "op"),
        "GATHER": ("IGatherLayer", "mode"),
        "REDUCE": ("IReduceLayer", "op"),
        "ACTIVATION": ("IActivationLayer", "type"),
        "TOPK": ("ITopKLayer", "op"),
    }
)


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One layer.

    Attributes:
        name: From the graph's node.
        type: As TensorRT calls it, e.g. ``ELEMENTWISE``.
        operation: What it does where the type leaves that open, e.g. ``MIN``; else None.
        inputs: Names of tensors.
        outputs: Names of tensors.
    """

    name: str
    type: str
    operation: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NetworkView:
    """A network as TensorRT parsed it.

    Attributes:
        inputs: In order.
        outputs: In order.
        layers: In the order they were parsed, which is one they can run in.
    """

    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    layers: tuple[LayerView, ...]

    def producer(self, tensor: str) -> LayerView | None:
        """The layer that makes a tensor; None for an input."""
        return next((layer for layer in self.layers if tensor in layer.outputs), None)

    def consumers(self, tensor: str) -> Iterator[LayerView]:
        """The layers that read a tensor, in order."""
        return (layer for layer in self.layers if tensor in layer.inputs)

    def downstream(self, tensor: str) -> Iterator[LayerView]:
        """Every layer that what is in a tensor reaches, in order."""
        reached = {tensor}
        for layer in self.layers:
            if reached & set(layer.inputs):
                reached |= set(layer.outputs)
                yield layer


def view_network(module: Any, network: Any) -> NetworkView:
    """Read a network.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        network: Its INetworkDefinition.
    """
    return NetworkView(
        inputs=tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs)),
        layers=tuple(_layer(module, network.get_layer(i)) for i in range(network.num_layers)),
    )


def check_interface(view: NetworkView, graph: GraphSpec) -> None:
    """A network's inputs and outputs are those the manifest says the graph has.

    Args:
        view: The network.
        graph: The manifest's.

    Raises:
        EngineError: one is missing, is there though it should not be, or has another dtype or
            shape. A named dimension may have any size that is not fixed.
    """
    for kind, seen, allowed in (
        ("input", view.inputs, graph.inputs),
        ("output", view.outputs, graph.outputs),
    ):
        found = {tensor.name: tensor for tensor in seen}
        wanted = {tensor.name: tensor for tensor in allowed}
        if list(found) != list(wanted):
            raise _differs(graph, f"{kind}s", ", ".join(found), ", ".join(wanted))
        for name, tensor in wanted.items():
            if not _fits(found[name], tensor):
                raise _differs(
                    graph,
                    f"{kind} {name}",
                    f"{found[name].dtype} {list(found[name].shape)}",
                    f"{tensor.dtype} {list(tensor.shape)}",
                )


def dtype_name(dtype: Any) -> str:
    """Our name of a TensorRT dtype, e.g. ``float16`` of ``DataType.HALF``."""
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())


def _fits(found: EngineTensor, wanted: TensorSpec) -> bool:
    if found.dtype != wanted.dtype or len(found.shape) != len(wanted.shape):
        return False
    pairs = zip(found.shape, wanted.shape, strict=True)
    # TensorRT may see more than the graph's names say: that an output's dimension is always 1.
    return all(size == dim or isinstance(dim, str) for size, dim in pairs)


def _differs(graph: GraphSpec, what: str, seen: str, allowed: str) -> EngineError:
    return EngineError(
        f"TensorRT sees other {what} in {graph.file} than the manifest states",
        seen=seen or "none",
        allowed=allowed or "none",
        fix="export the bundle again; report it if it stays",
    )


def _tensor(tensor: Any) -> EngineTensor:
    return EngineTensor(
        name=tensor.name,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        is_shape_tensor=bool(tensor.is_shape_tensor),
    )


def _layer(module: Any, layer: Any) -> LayerView:
    kind = str(layer.type.name)
    inputs = (layer.get_input(i) for i in range(layer.num_inputs))
    return LayerView(
        name=layer.name,
        type=kind,
        operation=_operation(module, layer, kind),
        # An optional input that is not given is None.
        inputs=tuple(tensor.name for tensor in inputs if tensor is not None),
        outputs=tuple(layer.get_output(i).name for i in range(layer.num_outputs)),
    )


def _operation(module: Any, layer: Any, kind: str) -> str | None:
    if kind not in _OPERATIONS:
        return None
    class_name, attribute = _OPERATIONS[kind]
    # TensorRT's own way: a layer of a network is an ILayer until it is told what it is.
    layer.__class__ = getattr(module, class_name)
    return str(getattr(layer, attribute).name)
