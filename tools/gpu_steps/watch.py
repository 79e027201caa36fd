"""Memory, power and energy of the GPUs while something runs, by nvidia-ml-py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from statistics import mean
from typing import Any

from gpu_steps.record import Figures


class GpuWatch:
    """Samples what all GPUs of this machine take together.

    Args:
        nvml: The module ``pynvml``; imported where not given.

    Attributes:
        missing: Why nothing is measured; empty where it is.
    """

    def __init__(self, nvml: Any = None) -> None:
        self.missing = ""
        self._memory: list[int] = []
        self._watts: list[float] = []
        self._degrees: list[float] = []
        self._gpus: list[Any] = []
        if nvml is None:
            try:
                import pynvml as nvml
            except ImportError:
                self.missing = "nvidia-ml-py is not installed: the extra bench has it"
                return
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
            self._gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except nvml.NVMLError as err:
            self.missing = f"NVML says: {err}"
        if not (self._gpus or self.missing):
            self.missing = "NVML shows no GPU"
        self._joules = self._of_all(lambda gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3)

    def sample(self) -> None:
        """Look once."""
        if self.missing:
            return
        nvml = self._nvml

        def temperature(gpu: Any) -> Any:
            return nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)

        for values, found in (
            (self._memory, self._of_all(lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used)),
            (self._watts, self._of_all(lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)),
            (self._degrees, self._of_all(temperature, join=max)),
        ):
            if found is not None:
                values.append(found)

    def figures(self) -> Figures:
        """What was seen; what a GPU does not tell is None."""
        if self.missing:
            return {"not_measured": self.missing}
        joules = self._of_all(lambda gpu: self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3)
        known = joules is not None and self._joules is not None
        return {
            "gpus": len(self._gpus),
            "samples": len(self._memory),
            "memory_at_first_bytes": self._memory[0] if self._memory else None,
            "memory_peak_bytes": max(self._memory, default=None),
            "power_mean_w": mean(self._watts) if self._watts else None,
            "power_max_w": max(self._watts, default=None),
            "temperature_max_c": max(self._degrees, default=None),
            "energy_j": joules - self._joules if known else None,
        }

    def close(self) -> None:
        """Let NVML go."""
        if not self.missing:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _of_all(self, read: Callable[[Any], Any], join: Callable[[Any], Any] = sum) -> Any:
        """Of the GPUs together; None where one does not tell."""
        if self.missing:
            return None
        try:
            return join(read(gpu) for gpu in self._gpus)
        except self._nvml.NVMLError:
            return None
