"""How much memory engines take: an estimate before they are built, the peak after."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gap_export.bundle import Bundle
from gap_export.engines.device import Gpu
from gap_export.engines.profiles import cache_capacity
from gap_export.graph.onnx_file import OnnxFile
from gap_export.spec.manifest import EngineLimits, GraphSpec

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# Written to clear_refs, it sets the peak back to what is resident now; see proc(5).
_RESET_PEAK = "5"

_ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2})
# Activations that live at a time in a Llama decoder's widest layer, in hidden sizes: the MLP's two
# products of about 2.7 hidden sizes each, their input, and the residual.
_LIVE_WIDTHS = 8
# Measured with TensorRT-RTX 1.7.1, two profiles, a Llama decoder of 2 to 8 layers of 7B's width:
# 2.7 (INT4) to 2.9 times (float16) the weights in memory of its own, see tools/bench_engines.py.
_COPIES_WHILE_BUILDING = 3


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes, from the manifest and the limits alone.

    Attributes:
        weights: Weights of all engines.
        largest_weights: Weights of the largest engine.
        kv_cache: The cache of the largest batch, at full length.
        activations: What lives at a time in the decoder's prefill, roughly.
    """

    weights: int
    largest_weights: int
    kv_cache: int
    activations: int

    @property
    def running(self) -> int:
        """While a session runs: all engines are loaded."""
        return self.weights + self.kv_cache + self.activations

    @property
    def building(self) -> int:
        """While the largest engine is built, one at a time."""
        return _COPIES_WHILE_BUILDING * self.largest_weights + self.activations


def estimate_memory(
    bundle: Bundle, graphs: Iterable[GraphSpec], limits: EngineLimits
) -> MemoryEstimate:
    """What engines of these graphs will take.

    Args:
        bundle: The bundle.
        graphs: Some of its graphs.
        limits: The largest sizes.

    Raises:
        BundleError: a graph is no ONNX file.
    """
    graphs = tuple(graphs)
    weights = [weight_bytes(bundle, graph) for graph in graphs]
    decoder = bundle.manifest.decoder
    item = max((_ITEM_BYTES[graph.dtype] for graph in graphs), default=2)
    slots = limits.max_batch * cache_capacity(limits)
    tokens = limits.max_batch * limits.max_prompt
    heads = decoder.num_heads or decoder.hidden_size // decoder.head_dim
    scores = limits.max_batch * heads * limits.max_prompt**2
    return MemoryEstimate(
        weights=sum(weights),
        largest_weights=max(weights, default=0),
        kv_cache=2
        * decoder.num_layers
        * decoder.num_key_value_heads
        * decoder.head_dim
        * slots
        * item,
        # Attention scores count once: they may be kept whole where no fused kernel is found.
        activations=(_LIVE_WIDTHS * decoder.hidden_size * tokens + scores) * item,
    )


def weight_bytes(bundle: Bundle, graph: GraphSpec) -> int:
    """Bytes of a graph's weights.

    Raises:
        BundleError: not an ONNX file.
    """
    constants = OnnxFile.read(bundle.file(graph.file)).initializers.values()
    return sum(constant.size or 0 for constant in constants)


def memory_warnings(
    estimate: MemoryEstimate, *, gpu: Gpu | None, free_host: int | None
) -> tuple[str, ...]:
    """What to tell the user where memory will hardly do.

    Args:
        estimate: What the engines take.
        gpu: The GPU they are for; None where it is not at hand.
        free_host: Bytes of the machine's memory that are free; None where that is not known.
    """
    found = []
    advice = "lower --max-prompt or --batch, or export with --dtype int4"
    if free_host is not None and estimate.building > free_host:
        found.append(
            f"building takes about {_gib(estimate.building)}, {_gib(free_host)} are free: close "
            f"what else runs, add swap, or {advice}"
        )
    if gpu is not None and estimate.running > gpu.memory_bytes:
        found.append(
            f"running takes about {_gib(estimate.running)} (weights {_gib(estimate.weights)}, KV "
            f"cache {_gib(estimate.kv_cache)}, activations {_gib(estimate.activations)}), "
            f"{gpu.name} has {_gib(gpu.memory_bytes)}: {advice}"
        )
    return tuple(found)


def reset_peak() -> None:
    """Have :func:`peak_bytes` count from now on, where the system can."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        # Then the peak is that of the whole process, which is no less.
        return


def peak_bytes() -> int:
    """The most memory this process had resident since :func:`reset_peak`, mapped files included."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
