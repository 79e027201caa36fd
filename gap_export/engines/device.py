"""The GPU at hand, asked through its driver's C library: no package is needed for that.

The functions are those of the CUDA driver API, `libcuda.so.1`, which is there wherever a GPU works,
on a Jetson as well.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

_DRIVER = "libcuda.so.1"
_MEMINFO = Path("/proc/meminfo")
# CUdevice_attribute of cuda.h.
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU.

    Attributes:
        name: The driver's name of it.
        compute_capability: SM number, e.g. 89.
        memory_bytes: All of it; of an integrated GPU: the machine's memory that is free now.
        integrated: It shares the machine's memory, as on a Jetson.
    """

    name: str
    compute_capability: int
    memory_bytes: int
    integrated: bool


def find_gpu() -> Gpu | None:
    """The first GPU; None where there is none, or no driver."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    if driver.cuInit(0) != 0:
        return None
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    total = ctypes.c_size_t()
    major, minor, integrated = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    codes = (
        driver.cuDeviceGetName(name, _NAME_BYTES, device),
        driver.cuDeviceTotalMem_v2(ctypes.byref(total), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(integrated), _INTEGRATED, device),
    )
    if any(codes):
        return None
    shared = bool(integrated.value)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=major.value * 10 + minor.value,
        memory_bytes=(free_memory() or total.value) if shared else total.value,
        integrated=shared,
    )


def free_memory() -> int | None:
    """Bytes of the machine's memory that can be had without swapping; None if not known."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None
