"""What is measured: bundles in backends, which must hold the same weights to be compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gap_export.bundle import Bundle, open_bundle
from gap_export.errors import UsageError
from gap_export.graph.onnx_file import BFLOAT16, FLOAT, FLOAT16, INT64, OnnxFile
from gap_export.runtime.backends.backend import DECODER
from gap_export.spec.manifest import Manifest

# What `--backend` takes, and what a session calls it; after a colon the form of the graphs, or what
# is computed in.
BACKENDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ort": {"backend": "onnxruntime"},
        "ort:base": {"backend": "onnxruntime", "form": "base"},
        "ort:ort": {"backend": "onnxruntime", "form": "ort"},
        "openvino": {"backend": "openvino"},
        "openvino:bfloat16": {
            "backend": "openvino",
            "openvino": {"inference_precision": "bfloat16"},
        },
        "trt": {"backend": "tensorrt"},
    }
)
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One bundle in one backend.

    Attributes:
        name: Unique among those measured.
        label: The bundle's name alone.
        backend: As ``--backend`` has it.
    """

    name: str
    label: str
    backend: str
    bundle: Bundle

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return self.bundle.manifest

    @property
    def is_unpruned(self) -> bool:
        """Whether it drops nothing."""
        pruning = self.manifest.pruning
        return pruning.num_kept_tokens == pruning.num_visual_tokens and pruning.budget == "fixed"

    @property
    def dtype(self) -> str:
        """Of its floats, and all else that its layers compute with, since that is no pruning."""
        told: list[str] = []
        decoder = self.manifest.graph(DECODER)
        if decoder.quantization is not None:
            told.append(decoder.quantization.dtype)
            told += ["LM head too"] if decoder.quantization.lm_head else []
            told += ["int8 activations"] if decoder.activations == "int8" else []
        if any(graph.linear_layers == "int8" for graph in self.manifest.graphs):
            told.append("int8 tower")
        return self.manifest.dtype + (f" ({', '.join(told)})" if told else "")

    def arguments(self, num_threads: int | None) -> dict[str, Any]:
        """What :meth:`GroundingSession.open` takes for it, as JSON knows it."""
        return {**BACKENDS[self.backend], "num_threads": num_threads}


def contenders_of(paths: Sequence[Path], backends: Sequence[str]) -> list[Contender]:
    """Each bundle in each backend.

    Raises:
        BundleError: one is damaged, or no bundle.
        UsageError: one is named twice, an unknown backend, or bundles of different weights.
    """
    unknown = next((name for name in backends if name not in BACKENDS), None)
    if unknown is not None or not backends:
        raise UsageError("no such backend", seen=unknown, allowed=", ".join(BACKENDS))
    bundles = [open_bundle(path) for path in paths]
    if not bundles:
        raise UsageError("no bundle to measure")
    twice = next((one for i, one in enumerate(bundles) if one.path in _paths(bundles[:i])), None)
    if twice is not None:
        raise UsageError("a bundle is named twice", seen=twice.path)
    refuse_different_weights(bundles)
    many = len(dict.fromkeys(backends)) > 1
    return [
        Contender(
            name=f"{label} {backend}" if many else label,
            label=label,
            backend=backend,
            bundle=bundle,
        )
        for label, bundle in zip(short_names(_paths(bundles)), bundles, strict=True)
        for backend in dict.fromkeys(backends)
    ]


def refuse_different_weights(bundles: Sequence[Bundle]) -> None:
    """Bundles of different models, or of different checkpoints of one, are no comparison.

    A file that only some were made of (a text tower that one pruner reads) says nothing.

    Raises:
        UsageError: they are.
    """
    first = bundles[0]
    for other in bundles[1:]:
        mine, theirs = _weights_of(first.manifest), _weights_of(other.manifest)
        shared = mine.keys() & theirs.keys()
        differ = sorted(name for name in shared if mine[name] != theirs[name])
        if first.manifest.model.name != other.manifest.model.name:
            differ.insert(0, "the model")
        if differ or not shared:
            raise UsageError(
                "the bundles are of different weights, so their speed cannot be compared",
                seen=f"{first.path} and {other.path} ({', '.join(differ) or 'no file in common'})",
                allowed="bundles of one checkpoint, with any pruning and dtype",
                fix="export them from the same checkpoint, or measure each by itself",
            )


def unpruned_of(one: Contender, contenders: Sequence[Contender]) -> Contender | None:
    """What a pruned contender is compared with: same backend and dtype, nothing dropped."""
    if one.is_unpruned:
        return None
    same = (
        other
        for other in contenders
        if other.is_unpruned and (other.backend, other.dtype) == (one.backend, one.dtype)
    )
    return next(same, None)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [path.parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*one[-length:]) for one in parts]  # noqa: PTH118
        if len(set(names)) == len(names):
            break
    return names


@dataclass(frozen=True, kw_only=True)
class DecoderCosts:
    """What a decoder must do at least, whatever runs it.

    Attributes:
        weights: Numbers that multiply, the LM head's among them.
        head: Those of the LM head alone.
        weight_bytes: Bytes that they are held in.
        attended: Multiply-adds of attention for one pair of tokens.
        cache_bytes: Of keys and values of one token.
    """

    weights: int
    head: int
    weight_bytes: int
    attended: int
    cache_bytes: int

    def prefill_operations(self, num_tokens: float) -> float:
        """Of a prompt: two for each multiply-add; the LM head reads the last token alone.

        Attention is counted in full, as runtimes compute it that mask what is to come.
        """
        linear = (self.weights - self.head) * num_tokens + self.head
        return 2 * (linear + self.attended * num_tokens**2)

    def decode_bytes(self, num_past: float) -> float:
        """Read for one token: all weights, and what is in the cache."""
        return self.weight_bytes + self.cache_bytes * num_past


def costs_of(bundle: Bundle) -> DecoderCosts:
    """Read off the base graph of the decoder."""
    manifest = bundle.manifest
    spec = manifest.decoder
    held = [
        one
        for one in OnnxFile.read(bundle.file(manifest.graph(DECODER).file)).initializers.values()
        if one.location is not None and one.size is not None and one.dtype != INT64
    ]
    quantization = manifest.graph(DECODER).quantization
    floats = sum(one.size or 0 for one in held if _is_float(one.dtype))
    packed = sum(one.size or 0 for one in held if not _is_float(one.dtype))
    num_packed = 2 * packed
    num_floats = floats // _BYTES[manifest.dtype]
    # A scale is no weight that multiplies a token.
    if quantization is not None:
        num_floats -= num_packed // quantization.block_size
    heads = spec.num_heads or spec.hidden_size // spec.head_dim
    return DecoderCosts(
        weights=num_packed + num_floats,
        head=spec.vocab_size * spec.hidden_size,
        weight_bytes=floats + packed,
        attended=2 * spec.num_layers * heads * spec.head_dim,
        cache_bytes=2
        * spec.num_layers
        * spec.num_key_value_heads
        * spec.head_dim
        * _BYTES[manifest.dtype],
    )


def _is_float(dtype: int) -> bool:
    return dtype in (FLOAT, FLOAT16, BFLOAT16)


def _paths(bundles: Sequence[Bundle]) -> list[Path]:
    return [bundle.path for bundle in bundles]


def _weights_of(manifest: Manifest) -> dict[str, object]:
    """What tells the weights: the hash of each file that was read, or the seed."""
    if manifest.source.random_seed is not None:
        return {"random weights": manifest.source.random_seed}
    return {
        f"{part.role}: {file.path}": file.sha256
        for part in manifest.source.parts
        for file in part.files
    }
