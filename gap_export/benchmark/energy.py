"""What the board's meters say an answer took, where it has any.

- RAPL, of Intel's and AMD's processors: ``energy_uj`` below /sys/class/powercap (Linux's
  Documentation/power/powercap/powercap.rst), which most systems show to root alone;
- nvidia-ml-py, of an NVIDIA GPU of Volta or later: nvmlDeviceGetTotalEnergyConsumption, in mJ;
- tegrastats, of a Jetson: milliwatts of the board's rails, summed over time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")
_TEGRASTATS = "tegrastats"
_INTERVAL_MS = 50
# VDD_GPU_SOC 4940mW/4940mW: now, and the mean since it started.
_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)mW/\d+mW")
# Where a rail feeds the whole board, the others are parts of it.
_WHOLE_BOARD = ("VDD_IN", "VIN", "POM_5V_IN")


class Meter(ABC):
    """Counts energy.

    Attributes:
        name: What it reads, for people.
    """

    name: str

    @abstractmethod
    def joules(self) -> float:
        """Since any fixed moment."""

    def close(self) -> None:  # noqa: B027, most have nothing to end
        """End what counts."""


class RaplMeter(Meter):
    """The processor packages of this machine.

    Args:
        zones: Folders of them.
    """

    def __init__(self, zones: list[Path]) -> None:
        self.name = f"RAPL ({', '.join((zone / 'name').read_text().strip() for zone in zones)})"
        self._files = [zone / "energy_uj" for zone in zones]
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self._last = self._read()
        self._total = 0

    def joules(self) -> float:
        """See Meter; counters begin again at 0, at most once between two calls."""
        now = self._read()
        for before, after, limit in zip(self._last, now, self._ranges, strict=True):
            self._total += after - before if after >= before else after + limit - before
        self._last = now
        return self._total / 1e6

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file in self._files]


class NvmlMeter(Meter):
    """All GPUs that NVIDIA's driver shows.

    Args:
        nvml: The module ``pynvml``, initialized.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        self.name = f"NVML ({len(self._gpus)} GPU{'s' if len(self._gpus) > 1 else ''})"
        self.joules()

    def joules(self) -> float:
        """See Meter."""
        used = (self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in self._gpus)
        return float(sum(used)) / 1e3

    def close(self) -> None:
        """See Meter."""
        self._nvml.nvmlShutdown()


class TegrastatsMeter(Meter):
    """The rails of a Jetson, power times time."""

    def __init__(self) -> None:
        self.name = _TEGRASTATS
        command = [_TEGRASTATS, "--interval", str(_INTERVAL_MS)]
        self._process = subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._joules, self._watts, self._since = 0.0, 0.0, time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._follow, daemon=True).start()

    def joules(self) -> float:
        """See Meter."""
        with self._lock:
            self._count()
            return self._joules

    def close(self) -> None:
        """See Meter."""
        self._process.kill()
        self._process.wait()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._lock:
                self._count()
                self._watts = board_watts(line)

    def _count(self) -> None:
        now = time.monotonic()
        self._joules += self._watts * (now - self._since)
        self._since = now


def board_watts(line: str) -> float:
    """Power that a line of tegrastats tells: the board's, or the sum of its rails'."""
    rails = {name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line)}
    whole = next((rails[name] for name in _WHOLE_BOARD if name in rails), None)
    return sum(rails.values()) if whole is None else whole


def find_meter(powercap: Path = _POWERCAP) -> tuple[Meter | None, str]:
    """The meter of this machine, and its name; None, and why there is none."""
    if shutil.which(_TEGRASTATS):
        meter = TegrastatsMeter()
        return meter, meter.name
    reasons = []
    for find in (_nvml, lambda: _rapl(powercap)):
        found, why = find()
        if found is not None:
            return found, why
        reasons.append(why)
    return None, f"not measured: {'; '.join(reasons)}"


def _nvml() -> tuple[Meter | None, str]:
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py (extra bench) is not installed"
    try:
        pynvml.nvmlInit()
        meter = NvmlMeter(pynvml)
    except pynvml.NVMLError as err:
        return None, f"no GPU that counts energy ({err})"
    return meter, meter.name


def _rapl(powercap: Path) -> tuple[Meter | None, str]:
    # intel-rapl:0 is a package, intel-rapl:0:0 a part of it.
    zones = sorted(path for path in powercap.glob("*-rapl:*") if path.name.count(":") == 1)
    if not zones:
        return None, "no RAPL counters in /sys/class/powercap"
    with suppress(OSError, ValueError):
        meter = RaplMeter(zones)
        return meter, meter.name
    return None, f"{zones[0] / 'energy_uj'} cannot be read: try as root"
