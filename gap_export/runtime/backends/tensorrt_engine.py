"""Runs one TensorRT engine: its shapes, its buffers, and the ways to have its work done.

Its inputs decide everything else: the manifest's named dimensions tie them to outputs, and an input
of a dimension's name (a shape tensor, which TensorRT reads from the host) holds its size. So the
size of each output is known before TensorRT is asked. Every buffer has room for the largest shape
of the engine's profiles and is allocated once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gap_export.engines.inspect import dtype_name
from gap_export.engines.log import TensorRTLog, quote
from gap_export.engines.plan import EngineSpec, ProfileSpec
from gap_export.errors import BundleError, EngineError, UsageError
from gap_export.runtime.backends.device import DeviceBuffer, DeviceMemory
from gap_export.spec.manifest import GraphSpec, TensorSpec

Shape = tuple[int, ...]
_Value = TypeVar("_Value")

# numpy has no bfloat16, whose bits are the upper half of a float32's.
_STORED: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
}
# The flag of `gap-export build` that decides the largest value of a dimension.
_FLAGS: Mapping[str, str] = {
    "num_images": "--batch",
    "batch_size": "--batch",
    "sequence_length": "--max-prompt",
    "prompt_length": "--max-prompt",
    "past_sequence_length": "--max-prompt or --max-new-tokens",
    "total_sequence_length": "--max-prompt or --max-new-tokens",
}
# A captured graph keeps an execution context, of a few MiB, alive.
MAX_CAPTURED_GRAPHS = 64


@dataclass(frozen=True)
class Bound:
    """An input that already lies on the GPU."""

    address: int
    shape: Shape


class DirectExecution:
    """Each call goes through TensorRT, which is given the shapes and addresses that changed."""

    def __init__(self, context: Any, stream: int, spec: EngineSpec, log: TensorRTLog) -> None:
        self._context, self._stream = context, stream
        self._where, self._log = spec.file, log
        self._on_host = {tensor.name for tensor in spec.inputs if tensor.is_shape_tensor}
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def enqueue(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Give the work to the stream.

        Args:
            shapes: Shapes of all inputs.
            addresses: Addresses of all inputs and outputs; those of shape tensors are the host's.

        Raises:
            EngineError: TensorRT refuses.
        """
        with self._log.recording() as errors:
            refusal = self._refusal(shapes, addresses)
        if refusal is not None:
            raise EngineError(
                f"TensorRT {refusal}",
                seen=f"{self._where}: {quote(errors)}",
                fix="build the engines again: gap-export build BUNDLE",
            )

    def _refusal(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> str | None:
        for name, shape in _changed(shapes, self._shapes):
            if not self._context.set_input_shape(name, shape):
                return f"refuses the shape {list(shape)} of {name}"
            self._shapes[name] = shape
        for name, address in _changed(addresses, self._addresses):
            if not self._context.set_tensor_address(name, address):
                return f"refuses the buffer of {name}"
            # TensorRT reads the host's memory when it gets the address, so it gets it each time.
            if name not in self._on_host:
                self._addresses[name] = address
        if not self._context.execute_async_v3(self._stream):
            return "cannot run the engine"
        return None


class CapturedExecution:
    """Records each combination of shapes and addresses the first time, and launches it after that.

    A captured graph holds for one set of shapes, and for a context that is not touched again, so
    each has a context of its own. Past ``MAX_CAPTURED_GRAPHS`` of them the rest is run directly.

    Args:
        make_direct: Gives a new context to run in, with the profile set.
        memory: Whose stream is captured; keeps the graphs.
    """

    def __init__(self, make_direct: Callable[[], DirectExecution], memory: DeviceMemory) -> None:
        self._make_direct = make_direct
        self._memory = memory
        self._direct = make_direct()
        self._captured: dict[tuple[object, ...], tuple[int, DirectExecution]] = {}

    def enqueue(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """See DirectExecution."""
        key = (*shapes.items(), *addresses.items())
        if key in self._captured:
            self._memory.device.launch(self._captured[key][0], self._memory.stream)
        elif len(self._captured) < MAX_CAPTURED_GRAPHS:
            self._capture(key, shapes, addresses)
        else:
            self._direct.enqueue(shapes, addresses)

    def _capture(
        self, key: tuple[object, ...], shapes: Mapping[str, Shape], addresses: Mapping[str, int]
    ) -> None:
        """Run once directly, which settles what depends on the shapes, and record the second."""
        device, stream = self._memory.device, self._memory.stream
        execution = self._make_direct()
        execution.enqueue(shapes, addresses)
        device.begin_capture(stream)
        try:
            execution.enqueue(shapes, addresses)
        finally:
            # A stream left capturing could not even be waited for.
            graph = device.end_capture(stream)
            self._memory.keep_graph(graph)
        self._captured[key] = (graph, execution)


Execution = DirectExecution | CapturedExecution


class EngineRunner:
    """One engine on the GPU, with a context and buffers for each of its profiles.

    Args:
        engine: TensorRT's engine.
        spec: What ``engine.json`` says of it.
        graph: What the manifest says of its graph.
        memory: Holds the buffers.
        executions: By profile.
        bound: Names of inputs and outputs that lie in buffers of the caller's.

    Raises:
        BundleError: the engine is not the one that ``engine.json`` describes.
        GapExportError: the GPU has no room.
    """

    def __init__(
        self,
        engine: Any,
        spec: EngineSpec,
        graph: GraphSpec,
        memory: DeviceMemory,
        *,
        executions: Mapping[str, Execution],
        bound: frozenset[str] = frozenset(),
    ) -> None:
        _check_engine(engine, spec)
        self.spec = spec
        self._graph = graph
        self._memory = memory
        self._executions = executions
        self._profiles: dict[str, ProfileSpec] = {p.name: p for p in spec.profiles}
        self._dtypes = {t.name: t.dtype for t in (*spec.inputs, *spec.outputs)}
        self._on_host = {tensor.name for tensor in spec.inputs if tensor.is_shape_tensor}
        largest = _largest(self._profiles.values(), graph)
        self._buffers: dict[str, DeviceBuffer] = {
            tensor.name: memory.allocate(self.num_bytes(tensor.name, _resolve(tensor, largest)))
            for tensor in (*graph.inputs, *graph.outputs)
            if tensor.name not in bound | self._on_host
        }

    def num_bytes(self, name: str, shape: Shape) -> int:
        """What a tensor of the engine takes in some shape."""
        return math.prod(shape) * _stored_dtype(self._dtypes[name], name).itemsize

    def largest(self, name: str, profile: str) -> Shape:
        """The largest shape of an input."""
        return self._profiles[profile].shapes[name].max

    def run(
        self,
        profile: str,
        feed: Mapping[str, NDArray[Any]],
        wanted: Sequence[str],
        *,
        bound_inputs: Mapping[str, Bound] | None = None,
        bound_outputs: Mapping[str, int] | None = None,
    ) -> list[NDArray[Any]]:
        """Run the engine and wait for it.

        Args:
            profile: Name of the optimization profile.
            feed: The other inputs, in any float dtype.
            wanted: Outputs to bring back.
            bound_inputs: Inputs that lie on the GPU.
            bound_outputs: Addresses of outputs that are to stay there.

        Returns:
            The wanted outputs; bfloat16 as float32.

        Raises:
            UsageError: a shape beyond what the engine was built for.
            GapExportError: TensorRT or the GPU fails.
        """
        bound_inputs = bound_inputs or {}
        device, stream = self._memory.device, self._memory.stream
        given = {name: _store(array, self._dtypes[name], name) for name, array in feed.items()}
        shapes = {name: array.shape for name, array in given.items()}
        shapes |= {name: value.shape for name, value in bound_inputs.items()}
        values = {name: tuple(given[name].tolist()) for name in self._on_host}
        self._check_shapes(self._profiles[profile], shapes)
        self._check_values(self._profiles[profile], values)
        sizes = _sizes(shapes, values, self._graph)
        for name, array in given.items():
            if name not in self._on_host:
                device.upload(self._buffers[name].address, array, stream)
        addresses = {name: buffer.address for name, buffer in self._buffers.items()}
        addresses |= {name: value.address for name, value in bound_inputs.items()}
        addresses |= {name: given[name].ctypes.data for name in self._on_host}
        self._executions[profile].enqueue(shapes, addresses | dict(bound_outputs or {}))
        found = []
        for tensor in self._graph.outputs:
            if tensor.name in wanted:
                dtype = _stored_dtype(self._dtypes[tensor.name], tensor.name)
                array = np.empty(_resolve(tensor, sizes), dtype)
                device.download(array, self._buffers[tensor.name].address, stream)
                found.append((tensor.name, array))
        device.synchronize(stream)
        by_name = {
            name: (array.astype(np.uint32) << 16).view(np.float32)
            if self._dtypes[name] == "bfloat16"
            else array
            for name, array in found
        }
        return [by_name[name] for name in wanted]

    def _check_shapes(self, profile: ProfileSpec, shapes: Mapping[str, Shape]) -> None:
        for tensor in self._graph.inputs:
            allowed, shape = profile.shapes[tensor.name], shapes[tensor.name]
            for dim, low, size, high in zip(
                tensor.shape, allowed.min, shape, allowed.max, strict=True
            ):
                if not low <= size <= high:
                    raise _beyond(self.spec, tensor.name, str(dim), size, f"{low}..{high}")

    def _check_values(self, profile: ProfileSpec, values: Mapping[str, Shape]) -> None:
        for name, (size,) in values.items():
            (low,), (high,) = profile.values[name].min, profile.values[name].max
            if not low <= size <= high:
                raise _beyond(self.spec, name, name, size, f"{low}..{high}")


def _changed(wanted: Mapping[str, _Value], known: Mapping[str, _Value]) -> list[tuple[str, _Value]]:
    return [(name, value) for name, value in wanted.items() if known.get(name) != value]


def _check_engine(engine: Any, spec: EngineSpec) -> None:
    """Buffers are made from ``engine.json``; were it wrong, the engine would write past them."""
    described = {t.name: (t.dtype, t.shape) for t in (*spec.inputs, *spec.outputs)}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        name: (dtype_name(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
        for name in names
    }
    odd = [
        name
        for name in sorted({*found, *described})
        if name not in found or name not in described or not _agree(found[name], described[name])
    ]
    if odd:
        raise BundleError(
            f"engine {spec.file} is not the one that engine.json describes",
            seen="; ".join(f"{name}: {found.get(name)}" for name in odd[:3]),
            allowed="; ".join(f"{name}: {described.get(name)}" for name in odd[:3]),
            fix="build the engines again: gap-export build",
        )
    on_host = {name for name in names if engine.is_shape_inference_io(name)}
    expected = {tensor.name for tensor in spec.inputs if tensor.is_shape_tensor}
    if on_host != expected:
        raise BundleError(
            f"engine {spec.file} reads other sizes from the host's memory than engine.json says",
            seen=", ".join(sorted(on_host)) or "none",
            allowed=", ".join(sorted(expected)) or "none",
            fix="build the engines again: gap-export build",
        )


def _agree(found: tuple[str, Shape], described: tuple[str, Shape]) -> bool:
    """Same dtype and dimensions; an engine may know one that the network left open (-1)."""
    (dtype, shape), (other_dtype, other) = found, described
    return (
        dtype == other_dtype
        and len(shape) == len(other)
        and all(a == b or min(a, b) < 0 for a, b in zip(shape, other, strict=True))
    )


def _largest(profiles: Iterable[ProfileSpec], graph: GraphSpec) -> dict[str, int]:
    """The largest value of each named dimension over all profiles."""
    sizes: dict[str, int] = {}
    for profile in profiles:
        largest = {name: shapes.max for name, shapes in profile.shapes.items()}
        values = {name: held.max for name, held in profile.values.items()}
        for name, size in _sizes(largest, values, graph).items():
            sizes[name] = max(size, sizes.get(name, 0))
    return sizes


def _sizes(
    shapes: Mapping[str, Shape], values: Mapping[str, Shape], graph: GraphSpec
) -> dict[str, int]:
    """Named dimensions by the shapes of a graph's inputs, and by those inputs that hold one."""
    named = {
        dim: size
        for tensor in graph.inputs
        for dim, size in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(dim, str)
    }
    return named | {name: size for name, (size,) in values.items()}


def _resolve(tensor: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    return tuple(_size(dim, sizes) if isinstance(dim, str) else dim for dim in tensor.shape)


def _size(dim: str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension, or of a sum such as ``num_kept_tokens + 1``."""
    name, _, more = dim.partition(" + ")
    return sizes[name] + int(more or 0)


def _beyond(spec: EngineSpec, tensor: str, dim: str, size: int, allowed: str) -> UsageError:
    flag = _FLAGS.get(dim)
    return UsageError(
        f"{dim} is beyond what engine {spec.file} was built for",
        seen=f"{size} in {tensor}",
        allowed=allowed,
        fix=f"build the engines with another {flag}: gap-export build BUNDLE" if flag else None,
    )


def _stored_dtype(dtype: str, name: str) -> np.dtype[Any]:
    if dtype not in _STORED:
        raise BundleError(
            "an engine has an input or output of a dtype that is not fed",
            seen=f"{name}: {dtype}",
            allowed=", ".join(_STORED),
            fix="export with another dtype",
        )
    return _STORED[dtype]


def _store(array: NDArray[Any], dtype: str, name: str) -> NDArray[Any]:
    """An array as the engine reads it: contiguous, of its dtype, bfloat16 rounded to even."""
    stored = _stored_dtype(dtype, name)
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype=stored)
    wide = np.ascontiguousarray(array, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    # Rounding must not turn a NaN into an infinity.
    return np.where(np.isnan(wide), np.uint32(0x7FC0), rounded).astype(stored)
