"""What can run a bundle on a GPU, in the order in which it is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from gap_export.bundle import open_bundle
from gap_export.errors import UsageError
from gap_export.runtime.session import GroundingSession
from tensorrt_bench.timing import BackendDecoder, Decoder, Feed

Runner = Callable[[Path], AbstractContextManager[tuple[str, Decoder]]]


@contextmanager
def tensorrt(bundle: Path) -> Iterator[tuple[str, Decoder]]:
    """The bundle's engines."""
    with GroundingSession.open(bundle, backend="tensorrt") as session:
        yield session.backend.name, BackendDecoder(session.backend)


@contextmanager
def tensorrt_graphs(bundle: Path) -> Iterator[tuple[str, Decoder]]:
    """The bundle's engines, each decode step as one CUDA graph."""
    with GroundingSession.open(bundle, backend="tensorrt", cuda_graphs=True) as session:
        yield f"{session.backend.name}, CUDA graphs", BackendDecoder(session.backend)


@contextmanager
def onnxruntime_cuda(bundle: Path) -> Iterator[tuple[str, Decoder]]:
    """The base graphs by ONNX Runtime's CUDA provider; the cache stays on the GPU."""
    providers = ["CUDAExecutionProvider"]
    with GroundingSession.open(bundle, execution_providers=providers) as session:
        yield session.backend.name, BackendDecoder(session.backend)


@contextmanager
def onnxruntime_cpu(bundle: Path) -> Iterator[tuple[str, Decoder]]:
    """The base graphs on the CPU: for a look at what the tool prints."""
    providers = ["CPUExecutionProvider"]
    with GroundingSession.open(bundle, execution_providers=providers) as session:
        yield session.backend.name, BackendDecoder(session.backend)


def pytorch_cuda(bundle: Path) -> AbstractContextManager[tuple[str, Decoder]]:
    """The reference's decoder in PyTorch on the GPU, in the bundle's dtype."""
    return pytorch(bundle, "cuda")


@contextmanager
def pytorch(bundle: Path, device: str) -> Iterator[tuple[str, Decoder]]:
    """The same on a device by PyTorch's name.

    Raises:
        UsageError: PyTorch sees no GPU.
    """
    import torch

    from gap_export.checkpoint.find.bundle_source import resolve_source
    from gap_export.families import build_reference

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU", seen=f"torch {torch.__version__}")
    manifest = open_bundle(bundle).manifest
    recipe, checkpoint = resolve_source(manifest, {})
    reference = build_reference(
        recipe, checkpoint, manifest.pruning, device="cpu", dtype=manifest.dtype
    )
    where = torch.cuda.get_device_name() if device == "cuda" else device
    with torch.inference_mode():
        decoder = _TorchDecoder(reference, device)
        yield f"PyTorch {torch.__version__} ({where}, {manifest.dtype})", decoder


class _TorchDecoder:
    """Joins its cache, as the graphs of the portable lowering do."""

    def __init__(self, reference: Any, device: str) -> None:
        import torch

        self._torch, self._device = torch, device
        self._decoder = reference.decoder.to(device)
        self._dtype = getattr(torch, reference.dtype)
        spec = reference.decoder_spec
        shape = (1, spec.num_key_value_heads, 0, spec.head_dim)
        self._empty = [torch.zeros(shape, dtype=self._dtype, device=device)] * (2 * spec.num_layers)
        self._cache = self._empty

    def start(self, num_slots: int) -> None:
        """See Decoder."""
        del num_slots
        self._cache = self._empty

    def step(self, feed: Feed) -> None:
        """See Decoder."""
        embeds, mask, ids = (
            self._torch.from_numpy(feed[name]).to(self._device)
            for name in ("inputs_embeds", "attention_mask", "position_ids")
        )
        logits, *self._cache = self._decoder(embeds.to(self._dtype), mask, ids, *self._cache)
        logits[:, -1].float().cpu()


GPU_RUNNERS: tuple[Runner, ...] = (tensorrt, tensorrt_graphs, onnxruntime_cuda, pytorch_cuda)
