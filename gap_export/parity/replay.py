"""Record what a session asks of one backend, and replay it on another.

Both backends then see identical inputs at every step, so that each output's difference is its
own and not one inherited from an earlier stage. Only the KV cache is the candidate's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.runtime.backend import Backend, EncodedImage, KVCache, ScoredImage
from gap_export.spec.manifest import QuantizationSpec

FloatArray = NDArray[np.floating[Any]]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a backend.

    Attributes:
        method: Which.
        inputs: With what.
        outputs: What it gave, by name.
        margins: Where tokens were chosen one by one, by how much the closest choice was decided,
            float32 [B]: of two that rounding alone tells apart another backend may choose the
            other. None where that is not known.
    """

    method: str
    inputs: dict[str, NDArray[Any] | None]
    outputs: dict[str, NDArray[Any]]
    margins: NDArray[np.float32] | None = None

    @property
    def is_decode(self) -> bool:
        """Whether it ran the decoder, be it prefill or a step."""
        return self.method == "decode"


@dataclass
class RecordingBackend:
    """Passes every call on to ``inner`` and keeps it in ``calls``.

    ``margins`` gives those of a call, from pixels and texts; None: they are not asked for.
    """

    inner: Backend
    calls: list[Call] = field(default_factory=list)
    margins: Callable[[FloatArray, FloatArray | None], NDArray[np.float32] | None] | None = None

    @property
    def name(self) -> str:
        """The inner backend's."""
        return self.inner.name

    @property
    def dtype(self) -> str:
        """The inner backend's."""
        return self.inner.dtype

    @property
    def quantization(self) -> QuantizationSpec | None:
        """The inner backend's."""
        return self.inner.quantization

    def __enter__(self) -> RecordingBackend:
        """Enter the inner backend."""
        self.inner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the inner backend."""
        self.inner.__exit__(kind, value, traceback)

    def encode_text(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        embeds = self.inner.encode_text(input_ids)
        self._keep("encode_text", {"input_ids": input_ids}, {"text_embeds": embeds})
        return embeds

    def encode_image(
        self, pixel_values: FloatArray, text_embeds: FloatArray | None
    ) -> EncodedImage:
        """See Backend."""
        encoded = EncodedImage(*self.inner.encode_image(pixel_values, text_embeds))
        given = {"pixel_values": pixel_values, "text_embeds": text_embeds}
        margins = None if self.margins is None else self.margins(pixel_values, text_embeds)
        self._keep("encode_image", given, _present(encoded), margins)
        return encoded

    def score_tokens(self, pixel_values: FloatArray, text_embeds: FloatArray | None) -> ScoredImage:
        """See Backend."""
        scored = self.inner.score_tokens(pixel_values, text_embeds)
        given = {"pixel_values": pixel_values, "text_embeds": text_embeds}
        self._keep("score_tokens", given, _present(scored))
        return scored

    def prune_tokens(self, scored: ScoredImage, *, num_kept_tokens: int) -> EncodedImage:
        """See Backend."""
        pruned = self.inner.prune_tokens(scored, num_kept_tokens=num_kept_tokens)
        given = {**scored._asdict(), "num_kept_tokens": np.asarray(num_kept_tokens)}
        self._keep("prune_tokens", given, _present(pruned))
        return pruned

    def image_newline(self) -> FloatArray:
        """See Backend."""
        newline = self.inner.image_newline()
        self._keep("image_newline", {}, {"image_newline": newline})
        return newline

    def embed_tokens(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        embeds = self.inner.embed_tokens(input_ids)
        self._keep("embed_tokens", {"input_ids": input_ids}, {"inputs_embeds": embeds})
        return embeds

    def new_cache(self, batch_size: int) -> KVCache:
        """See Backend."""
        self._keep("new_cache", {"batch_size": np.asarray(batch_size)}, {})
        return self.inner.new_cache(batch_size)

    def decode(
        self,
        *,
        inputs_embeds: FloatArray,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        kept_positions: Int64Array,
        cache: KVCache,
    ) -> FloatArray:
        """See Backend."""
        given = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "kept_positions": kept_positions,
        }
        logits = self.inner.decode(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            kept_positions=kept_positions,
            cache=cache,
        )
        self._keep("decode", given, {"logits": logits})
        return logits

    def _keep(
        self,
        method: str,
        inputs: dict[str, Any],
        outputs: dict[str, Any],
        margins: NDArray[np.float32] | None = None,
    ) -> None:
        copied = {k: None if v is None else np.array(v) for k, v in inputs.items()}
        kept = {k: np.array(v) for k, v in outputs.items()}
        self.calls.append(Call(method=method, inputs=copied, outputs=kept, margins=margins))


def _present(parts: EncodedImage | ScoredImage) -> dict[str, NDArray[Any]]:
    """Those that are there, by the names of the graph's outputs."""
    return {name: part for name, part in parts._asdict().items() if part is not None}


def replay(calls: list[Call], candidate: Backend) -> list[dict[str, NDArray[Any]]]:
    """Outputs of the candidate for each recorded call, in order."""
    outputs: list[dict[str, NDArray[Any]]] = []
    cache: KVCache | None = None
    for call in calls:
        given = call.inputs
        if call.method == "new_cache":
            cache = candidate.new_cache(int(given["batch_size"]))  # type: ignore[arg-type]
            outputs.append({})
        elif call.method == "decode":
            assert cache is not None, "a session decodes only with a cache"
            outputs.append({"logits": candidate.decode(**given, cache=cache)})  # type: ignore[arg-type]
        elif call.method == "encode_image":
            encoded = EncodedImage(*candidate.encode_image(**given))  # type: ignore[arg-type]
            outputs.append(_present(encoded))
        elif call.method == "score_tokens":
            outputs.append(_present(candidate.score_tokens(**given)))  # type: ignore[arg-type]
        elif call.method == "prune_tokens":
            number = int(given["num_kept_tokens"])  # type: ignore[arg-type]
            scored = ScoredImage(*(given[name] for name in ScoredImage._fields))  # type: ignore[arg-type]
            outputs.append(_present(candidate.prune_tokens(scored, num_kept_tokens=number)))
        else:
            (name,) = call.outputs
            outputs.append({name: getattr(candidate, call.method)(**given)})
    return outputs
