"""The thin layer over CUDA: each call's error is seen; what a GPU holds is given back."""

from __future__ import annotations

import enum
import inspect
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gap_export.errors import GapExportError, MissingDependencyError, UsageError
from gap_export.runtime.backends import device as device_module
from gap_export.runtime.backends.device import CudaDevice, DeviceMemory
from tests.runtime.backends.fake_gpu import FakeDevice


class Error(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815 - CUDA's names
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorLaunchFailure = 719  # noqa: N815


class FakeRuntime:
    """Answers every call as cuda-python does: a tuple that starts with an error code."""

    cudaError_t = Error  # noqa: N815
    cudaDeviceAttr = SimpleNamespace(  # noqa: N815
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice="to the GPU", cudaMemcpyDeviceToHost="from the GPU"
    )
    cudaStreamCaptureMode = SimpleNamespace(  # noqa: N815
        cudaStreamCaptureModeThreadLocal="thread"
    )

    def __init__(self, **errors: Error) -> None:
        self.errors = errors
        self.calls: list[tuple[Any, ...]] = []
        self.results = {
            "cudaGetDeviceCount": 1,
            "cudaGetDeviceProperties": SimpleNamespace(name=b"NVIDIA Test\0\0"),
            "cudaMalloc": 4096,
            "cudaStreamCreate": 17,
            "cudaStreamEndCapture": 18,
            "cudaGraphInstantiate": 19,
        }

    def __getattr__(self, function: str) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            if function == "cudaGetErrorString":
                return Error.cudaSuccess, b"words of CUDA"
            if function == "cudaDeviceGetAttribute":
                return Error.cudaSuccess, {"major": 8, "minor": 9}[args[0]]
            self.calls.append((function, *args))
            error = self.errors.get(function, Error.cudaSuccess)
            if function in self.results:
                return error, self.results[function]
            return (error,)

        return call


def test_a_real_cuda_call_that_fails_raises_with_its_name_and_words():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    device = CudaDevice.__new__(CudaDevice)
    device._cuda = runtime
    # Nothing lies at address 1; without a driver nothing can be freed at all.
    with pytest.raises(GapExportError, match=r"CUDA failed in cudaFree: cudaError\w+ \(.+\)"):
        device.free(1)


def test_a_machine_without_a_gpu_is_a_user_error_that_says_what_cuda_says():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    error, count = runtime.cudaGetDeviceCount()
    if int(error) == 0 and count:
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match=f"no NVIDIA GPU.*{error.name}.*--backend ort"):
        CudaDevice()


def test_every_cuda_name_that_is_used_is_one_of_cuda_python():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    source = inspect.getsource(device_module)
    enums = (runtime.cudaDeviceAttr, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode)
    known = {name for one in (runtime, runtime.cudaError_t, *enums) for name in dir(one)}
    used = set(re.findall(r"\bcuda[A-Z]\w+", source))
    assert len(used) > 20
    assert used <= known


def test_no_gpu_at_all_is_refused():
    runtime = FakeRuntime()
    runtime.results["cudaGetDeviceCount"] = 0
    with pytest.raises(UsageError, match="CUDA counts 0 of them"):
        CudaDevice(runtime)


def test_name_and_compute_capability_are_read():
    device = CudaDevice(FakeRuntime())
    assert (device.name, device.compute_capability) == ("NVIDIA Test", 89)


def test_memory_that_runs_out_says_how_much_was_wanted_and_what_helps():
    device = CudaDevice(FakeRuntime(cudaMalloc=Error.cudaErrorMemoryAllocation))
    with pytest.raises(GapExportError, match=r"free memory: 3 MiB more.*--batch"):
        device.allocate(3 << 20)


@pytest.mark.parametrize(
    ("function", "use"),
    [
        ("cudaMalloc", lambda d, s: d.allocate(8)),
        ("cudaFree", lambda d, s: d.free(4096)),
        ("cudaStreamCreate", lambda d, s: d.create_stream()),
        ("cudaStreamDestroy", lambda d, s: d.destroy_stream(s)),
        ("cudaStreamSynchronize", lambda d, s: d.synchronize(s)),
        ("cudaMemsetAsync", lambda d, s: d.clear(4096, 8, s)),
        ("cudaMemcpyAsync", lambda d, s: d.upload(4096, np.zeros(2), s)),
        ("cudaMemcpyAsync", lambda d, s: d.download(np.zeros(2), 4096, s)),
        ("cudaStreamBeginCapture", lambda d, s: d.begin_capture(s)),
        ("cudaStreamEndCapture", lambda d, s: d.end_capture(s)),
        ("cudaGraphInstantiate", lambda d, s: d.end_capture(s)),
        ("cudaGraphLaunch", lambda d, s: d.launch(d.end_capture(s), s)),
        ("cudaGraphExecDestroy", lambda d, s: d.destroy_graph(d.end_capture(s))),
    ],
)
def test_each_call_passes_on_success_and_raises_on_failure(function, use):
    runtime = FakeRuntime()
    device = CudaDevice(runtime)
    stream = device.create_stream()
    use(device, stream)
    assert function in [call[0] for call in runtime.calls]
    device = CudaDevice(runtime)
    stream = device.create_stream()
    runtime.errors[function] = Error.cudaErrorLaunchFailure
    with pytest.raises(GapExportError, match=rf"{function}: cudaErrorLaunchFailure \(words of"):
        use(device, stream)


def test_copies_go_the_right_way():
    runtime = FakeRuntime()
    device = CudaDevice(runtime)
    stream = device.create_stream()
    array = np.zeros(3, np.float32)
    device.upload(4096, array, stream)
    device.download(array, 4096, stream)
    host = array.ctypes.data
    assert runtime.calls[-2:] == [
        ("cudaMemcpyAsync", 4096, host, 12, "to the GPU", 17),
        ("cudaMemcpyAsync", host, 4096, 12, "from the GPU", 17),
    ]


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(device_module, "_BINDINGS", "cuda_that_is_not_there")
    with pytest.raises(MissingDependencyError, match=r"cuda_that_is_not_there.*pip install"):
        CudaDevice()


def test_closing_gives_back_all_that_can_be_given_back(caplog):
    device = FakeDevice()
    memory = DeviceMemory(device)
    buffers = [memory.allocate(10), memory.allocate(20)]
    assert memory.num_bytes == 30
    memory.release(buffers[0])
    assert memory.num_bytes == 20
    device.begin_capture(memory.stream)
    memory.keep_graph(device.end_capture(memory.stream))
    device.fails.add("destroy_graph")
    memory.close()
    assert "fails in destroy_graph" in caplog.text
    assert not device.memory and not device.streams
    memory.close()
