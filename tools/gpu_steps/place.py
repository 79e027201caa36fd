"""Where a session runs: the GPU, what stands for it in a rehearsal, and its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gap_export.engines.device import Gpu, find_gpu
from gpu_steps.record import NotRunError

_REHEARSED = Gpu(
    name="none: a rehearsal on the CPU", compute_capability=89, memory_bytes=0, integrated=False
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A session's folder and machine.

    Attributes:
        folder: Of bundles, engines and figures.
        gpu: None where there is none.
        provider: The execution provider that is looked at; in a rehearsal the CPU's.
        torch_device: Likewise, of PyTorch.
        samples: Expressions that are asked.
        rounds: Of a benchmark.
        shape: What the random model is written as; None: the demo model stands for it.
    """

    folder: Path
    gpu: Gpu | None
    provider: str = "CUDAExecutionProvider"
    torch_device: str = "cuda"
    samples: int = 20
    rounds: int = 5
    shape: Callable[[Path], object] | None = None

    @property
    def is_rehearsal(self) -> bool:
        """Whether the CPU stands for a GPU."""
        return self.gpu is _REHEARSED

    def need_gpu(self) -> Gpu:
        """The GPU.

        Raises:
            NotRunError: there is none.
        """
        if self.gpu is None:
            raise NotRunError("no NVIDIA GPU: libcuda.so.1 is missing, or finds no device")
        return self.gpu

    def need_provider(self) -> str:
        """The execution provider.

        Raises:
            NotRunError: this ONNX Runtime has not got it.
        """
        from gap_export.runtime.backends.quiet_onnxruntime import ort

        found = ort.get_available_providers()
        if self.provider not in found:
            raise NotRunError(
                f"onnxruntime {ort.__version__} has no {self.provider}, only {', '.join(found)}: "
                "onnxruntime-gpu has it"
            )
        return self.provider

    def bundle(self, name: str) -> Path:
        """One of the session's bundles.

        Raises:
            NotRunError: it could not be exported.
        """
        path = self.folder / "bundles" / name
        if not path.is_dir():
            raise NotRunError(f"there is no bundle {name}: see the steps bundles and engines")
        return path


def real_place(folder: Path, shape: Callable[[Path], object]) -> Place:
    """This machine as it is."""
    return Place(folder=folder, gpu=find_gpu(), shape=shape)


def rehearsal(folder: Path) -> Place:
    """The CPU in place of a GPU, and less of everything: to see that the steps work."""
    return Place(
        folder=folder,
        gpu=_REHEARSED,
        provider="CPUExecutionProvider",
        torch_device="cpu",
        samples=4,
        rounds=1,
    )
