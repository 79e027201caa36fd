"""A GPU's memory and its queue of work, as the TensorRT backend needs them.

:class:`CudaDevice` is thin on purpose: each method is one call of the CUDA runtime (cuda-python 12
or 13) with its error checked, so that all that can be got wrong stands above it and is
tested without a GPU. Addresses and handles are plain integers here.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from gap_export.errors import GapExportError, MissingDependencyError, UsageError

_log = logging.getLogger(__name__)

_BINDINGS = "cuda.bindings.runtime"
_INSTALL = (
    "install it with: pip install cuda-python; its major version must not be above the CUDA "
    "version of the driver (12 on JetPack 6)"
)


class CudaDevice:
    """The GPU that CUDA calls device 0; choose another with ``CUDA_VISIBLE_DEVICES``.

    Work given to a stream is done in order, and is over after :meth:`synchronize`.

    Attributes:
        name: As its maker calls it.
        compute_capability: SM number, e.g. 89.

    Args:
        runtime: cuda-python's module ``cuda.bindings.runtime``; imported where not given.

    Raises:
        MissingDependencyError: cuda-python is not installed, or does not load.
        UsageError: there is no driver, or no GPU.
    """

    def __init__(self, runtime: Any = None) -> None:
        if runtime is None:
            try:
                runtime = importlib.import_module(_BINDINGS)
            except ImportError as err:
                raise MissingDependencyError(
                    "running TensorRT engines needs cuda-python", seen=err, fix=_INSTALL
                ) from err
        self._cuda = runtime
        self._graphs: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        error, count = self._cuda.cudaGetDeviceCount()
        if int(error) != 0 or count < 1:
            raise UsageError(
                "no NVIDIA GPU can be used here",
                seen="CUDA counts 0 of them" if int(error) == 0 else self._describe(error),
                fix="run it on a machine with a GPU and its driver; --backend ort needs neither",
            )
        attributes = self._cuda.cudaDeviceAttr
        major, minor = (
            int(self._call("cudaDeviceGetAttribute", attribute, 0))
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.compute_capability = 10 * major + minor
        properties = self._call("cudaGetDeviceProperties", 0)
        self.name = bytes(properties.name).rstrip(b"\0").decode()

    def allocate(self, num_bytes: int) -> int:
        """Allocate at least 1 byte, aligned to 256; gives the address."""
        error, address = self._cuda.cudaMalloc(max(num_bytes, 1))
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise GapExportError(
                "the GPU has not enough free memory",
                seen=f"{num_bytes / 2**20:.0f} MiB more were wanted",
                fix="close what else uses the GPU, or build engines with a smaller --batch, "
                "--max-prompt or --max-new-tokens",
            )
        self._check("cudaMalloc", error)
        return int(address)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cudaFree", address)

    def create_stream(self) -> int:
        """Make a new queue of work; gives its handle."""
        stream = self._call("cudaStreamCreate")
        self._streams[int(stream)] = stream
        return int(stream)

    def destroy_stream(self, stream: int) -> None:
        """Give a queue back."""
        self._call("cudaStreamDestroy", self._streams.pop(stream))

    def synchronize(self, stream: int) -> None:
        """Wait until all work of a queue is done."""
        self._call("cudaStreamSynchronize", self._streams[stream])

    def clear(self, address: int, num_bytes: int, stream: int) -> None:
        """Fill with zero bytes."""
        self._call("cudaMemsetAsync", address, 0, num_bytes, self._streams[stream])

    def upload(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the GPU; it must live until the work is done."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Copy into a contiguous array; it is filled when the work is done."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost", stream)

    def begin_capture(self, stream: int) -> None:
        """Record what follows on this queue instead of doing it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._streams[stream], mode)

    def end_capture(self, stream: int) -> int:
        """End the recording; gives the handle of a graph that can be launched."""
        recorded = self._call("cudaStreamEndCapture", self._streams[stream])
        try:
            graph = self._call("cudaGraphInstantiate", recorded, 0)
        finally:
            self._call("cudaGraphDestroy", recorded)
        self._graphs[int(graph)] = graph
        return int(graph)

    def launch(self, graph: int, stream: int) -> None:
        """Do what was recorded."""
        self._call("cudaGraphLaunch", self._graphs[graph], self._streams[stream])

    def destroy_graph(self, graph: int) -> None:
        """Give a recorded graph back."""
        self._call("cudaGraphExecDestroy", self._graphs.pop(graph))

    def _copy(self, target: int, source: int, num_bytes: int, kind: str, stream: int) -> None:
        direction = getattr(self._cuda.cudaMemcpyKind, kind)
        handle = self._streams[stream]
        self._call("cudaMemcpyAsync", target, source, num_bytes, direction, handle)

    def _call(self, function: str, *args: Any) -> Any:
        """Call the CUDA runtime; its first result is the error code, the second what it gives."""
        error, *results = getattr(self._cuda, function)(*args)
        self._check(function, error)
        return results[0] if results else None

    def _check(self, function: str, error: Any) -> None:
        if int(error) != 0:
            raise GapExportError(
                f"CUDA failed in {function}",
                seen=self._describe(error),
                fix="after such an error the program must be started again; if it stays, check the "
                "driver with nvidia-smi",
            )

    def _describe(self, error: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(error)
        return f"{getattr(error, 'name', error)} ({bytes(text).decode()})"


@dataclass(frozen=True)
class DeviceBuffer:
    """Memory of a GPU: where, and how much of it."""

    address: int
    num_bytes: int


class DeviceMemory:
    """All that a backend holds on a GPU, given back together: buffers, graphs and one stream."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        self.stream = device.create_stream()
        self._buffers: list[DeviceBuffer] = []
        self._graphs: list[int] = []
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Held in buffers at the moment."""
        return sum(buffer.num_bytes for buffer in self._buffers)

    def allocate(self, num_bytes: int) -> DeviceBuffer:
        """A new buffer.

        Raises:
            GapExportError: the GPU has no room, or fails.
        """
        buffer = DeviceBuffer(self.device.allocate(num_bytes), num_bytes)
        self._buffers.append(buffer)
        return buffer

    def release(self, buffer: DeviceBuffer) -> None:
        """Give one buffer back before the rest."""
        self._buffers.remove(buffer)
        self.device.free(buffer.address)

    def keep_graph(self, graph: int) -> None:
        """Give a recorded graph back with the rest."""
        self._graphs.append(graph)

    def settle(self) -> None:
        """Wait for the stream, so that what it works with can go; a failure is only logged."""
        _try(self.device.synchronize, self.stream)

    def close(self) -> None:
        """Give everything back, even if some of it fails; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.settle()
        for graph in self._graphs:
            _try(self.device.destroy_graph, graph)
        for buffer in self._buffers:
            _try(self.device.free, buffer.address)
        _try(self.device.destroy_stream, self.stream)
        self._graphs, self._buffers = [], []


def _try(release: Callable[[int], None], handle: int) -> None:
    """A GPU that has failed refuses these calls as well: the error that came first is the one."""
    try:
        release(handle)
    except GapExportError as err:
        _log.warning("while giving GPU memory back: %s", err)
