"""A parsed network's inputs and outputs as plain data, checked against the manifest."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Inputs and outputs of a network, in its order."""

    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]


def read_interface(network: Any) -> Interface:
    """Read them from TensorRT's INetworkDefinition."""
    return Interface(
        inputs=tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs)),
    )


def check_interface(interface: Interface, graph: GraphSpec) -> None:
    """See that a network's inputs and outputs are those the manifest says the graph has.

    Raises:
        EngineError: one is missing, is there though it should not be, or has another dtype or
            shape. A named dimension may have any size that is not fixed.
    """
    for kind, seen, allowed in (
        ("input", interface.inputs, graph.inputs),
        ("output", interface.outputs, graph.outputs),
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
