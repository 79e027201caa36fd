"""Backends for tests: one of a few lines of numpy, and one that changes what another gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gap_export.runtime.backends.backend import Backend
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import gap_remap


@dataclass
class FakeCache:
    """Everything fed so far: [B, T, H] and the ids RoPE would have seen, [B, T]."""

    batch_size: int
    num_slots: int
    embeds: Any = None
    ids: Any = None

    @property
    def length(self) -> int:
        return 0 if self.embeds is None else int(self.embeds.shape[1])


@dataclass
class FakeBackend(Backend):
    """One layer of "attention" by relative position; its answers depend on ids, mask and order."""

    manifest: Manifest
    closed: int = 0
    calls: list[str] = field(default_factory=list)
    feeds: list[Any] = field(default_factory=list)
    ids_seen: list[Any] = field(default_factory=list)
    name: str = "numpy"
    dtype: str = "float32"
    continues_prompts: bool = True

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        spec = self.manifest.decoder
        self._table = rng.normal(size=(spec.vocab_size, spec.hidden_size)).astype(np.float32)
        self._head = rng.normal(size=(spec.hidden_size, spec.vocab_size)).astype(np.float32)

    def close(self) -> None:
        self.closed += 1

    def run(self, component: str, feed: Any) -> Any:
        self.calls.append(component)
        self.feeds.append(feed)
        if component == "newline":
            assert self.manifest.newline is not None
            return {"image_newline": np.full(self.manifest.decoder.hidden_size, 0.5, np.float32)}
        if component == "text_encoder":
            return {"text_embeds": self._table[feed["input_ids"]].mean(axis=1)}
        if component == "embed_tokens":
            return {"inputs_embeds": self._table[feed["input_ids"]]}
        assert component == "vision_encoder"
        return self._see(**feed)

    def _see(self, pixel_values: Any, text_embeds: Any = None) -> Any:
        pruning = self.manifest.pruning
        emitted, hidden = pruning.num_emitted_tokens, self.manifest.decoder.hidden_size
        keep = np.arange(emitted, dtype=np.int64)[None].repeat(len(pixel_values), axis=0) * 3
        means = pixel_values.mean(axis=(1, 2, 3))[:, None]
        features = np.tanh(means + np.arange(emitted * hidden, dtype=np.float32))
        features = features.reshape(-1, emitted, hidden).astype(np.float32)
        if text_embeds is not None:
            shift = (np.abs(text_embeds).sum(axis=1) * 10).astype(np.int64) % 2
            keep = keep + shift[:, None]
            features = features + text_embeds[:, None, :]
        return {"image_features": features, "keep_indices": keep}

    def new_cache(self, batch_size: int, num_slots: int) -> FakeCache:
        return FakeCache(batch_size, num_slots)

    def fork_cache(self, cache: Any, batch_size: int, num_slots: int) -> FakeCache:
        assert cache.batch_size == 1
        rows = (values.repeat(batch_size, axis=0) for values in (cache.embeds, cache.ids))
        return FakeCache(batch_size, num_slots, *rows)

    def decode(self, feed: Any, cache: Any) -> Any:
        embeds, ids = feed["inputs_embeds"], gap_remap(feed["position_ids"], feed["kept_positions"])
        self.ids_seen.append(ids)
        first = cache.embeds is None
        cache.embeds = embeds if first else np.concatenate([cache.embeds, embeds], 1)
        cache.ids = ids if first else np.concatenate([cache.ids, ids], 1)
        assert feed["attention_mask"].shape == cache.ids.shape
        assert cache.length <= cache.num_slots
        distance = (cache.ids[:, -1:] - cache.ids).astype(np.float64)
        weights = (np.cos(0.3 * distance) + 1.1) * feed["attention_mask"]
        mixed = np.einsum("bt,bth->bh", weights, np.tanh(cache.embeds))
        return (mixed @ self._head).astype(np.float32)


@dataclass
class VerifyingBackend(FakeBackend):
    """Gives the logits of several tokens, which it computes one by one."""

    num_logits: int = 8

    def decode_each(self, feed: Any, cache: Any) -> Any:
        past = feed["attention_mask"].shape[1] - feed["position_ids"].shape[1]
        each = []
        for place in range(feed["position_ids"].shape[1]):
            one = {
                "inputs_embeds": feed["inputs_embeds"][:, place : place + 1],
                "attention_mask": feed["attention_mask"][:, : past + place + 1],
                "position_ids": feed["position_ids"][:, place : place + 1],
                "kept_positions": feed["kept_positions"],
            }
            each.append(self.decode(one, cache))
        return np.concatenate(each)


class EditedBackend(Backend):
    """Another backend, one of whose outputs is changed."""

    def __init__(self, inner: Backend, output: str, edit: Callable[[Any], Any]) -> None:
        self.name, self.dtype, self.quantization = inner.name, inner.dtype, inner.quantization
        self.continues_prompts = inner.continues_prompts
        self._inner, self._output, self._edit = inner, output, edit

    def _edited(self, name: str, values: Any) -> Any:
        return self._edit(np.array(values)) if name == self._output else values

    def close(self) -> None:
        self._inner.close()

    def run(self, component: str, feed: Any) -> Any:
        outputs = self._inner.run(component, feed)
        return {name: self._edited(name, values) for name, values in outputs.items()}

    def new_cache(self, batch_size: int, num_slots: int) -> Any:
        return self._inner.new_cache(batch_size, num_slots)

    def fork_cache(self, cache: Any, batch_size: int, num_slots: int) -> Any:
        return self._inner.fork_cache(cache, batch_size, num_slots)

    def decode(self, feed: Any, cache: Any) -> Any:
        return self._edited("logits", self._inner.decode(feed, cache))


def prefilled_embeds(session: Any, image: Any, expressions: list[str]) -> list[Any]:
    """inputs_embeds of the prefill, rows without their padding."""
    fed: list[Any] = []
    honest = session.backend.decode

    def decode(feed: Any, cache: Any) -> Any:
        if not fed:
            mask = feed["attention_mask"].astype(bool)
            fed.extend(row[keep] for row, keep in zip(feed["inputs_embeds"], mask, strict=True))
        return honest(feed, cache)

    session.backend.decode = decode
    session.ground_batch(image, expressions)
    return fed
