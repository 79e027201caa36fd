"""The beginning that several prompts have in common, computed once.

A decoder is causal: keys and values of a token depend on nothing behind it. So prompts that begin
with the same tokens, with the same position ids, share a cache of these, and each goes on by itself
from there. What comes out is what each prompt alone gives, up to rounding.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from gap_export.runtime.backends.backend import Backend, KVCache
from gap_export.runtime.byte_store import ByteStore
from gap_export.runtime.generation import DecoderPrompt, PromptRow
from gap_export.spec.manifest import DecoderSpec

# Below this a second call of the decoder, which reads all weights again, costs more than it saves.
_LEAST_SAVED = 32
_ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class KeptPrefix:
    """Where a beginning is kept between calls.

    Attributes:
        store: Holds caches of one row.
        key: Of the one that is meant: it says which tokens begin, and their ids.
        length: Number of these tokens.
    """

    store: ByteStore
    key: Hashable
    length: int


def common_length(rows: Sequence[PromptRow]) -> int:
    """How many tokens all rows begin with, those behind the image left out."""
    first, *others = rows
    length = len(first.prefix_embeds) + len(first.image_features)
    return min([length, *(_common(first, row) for row in others)])


def choose_length(rows: Sequence[PromptRow], backend: Backend, kept: KeptPrefix | None) -> int:
    """How many tokens are computed once for all rows; 0 where each prompt is read at once."""
    if not backend.continues_prompts:
        return 0
    common = common_length(rows)
    if kept is not None and 0 < kept.length <= common:
        return kept.length
    return common if common * (len(rows) - 1) >= _LEAST_SAVED else 0


def find_prefix(
    backend: Backend, prompt: DecoderPrompt, kept: KeptPrefix | None, spec: DecoderSpec
) -> KVCache:
    """A cache of the first tokens of a prompt, of one row: that which is kept, or a new one."""
    length = prompt.num_shared
    is_kept = kept is not None and kept.length == length
    cache: KVCache | None = kept.store.get(kept.key) if kept is not None and is_kept else None
    if cache is None:
        cache = backend.new_cache(1, length)
        backend.decode(prompt.shared_feed, cache)
        if kept is not None and is_kept:
            kept.store.put(kept.key, cache, length * bytes_per_slot(spec, backend.dtype))
    return cache


def bytes_per_slot(spec: DecoderSpec, dtype: str) -> int:
    """Bytes of the keys and values of one token."""
    return 2 * spec.num_layers * spec.num_key_value_heads * spec.head_dim * _ITEM_SIZES[dtype]


def _common(one: PromptRow, other: PromptRow) -> int:
    start = _num_equal(one.prefix_embeds, other.prefix_embeds)
    if start < max(len(one.prefix_embeds), len(other.prefix_embeds)):
        return start
    # A visual token's id follows from its index, the grid and the shift. What it counts as follows
    # from how many there are.
    seen = [(row.grid, row.shift, row.counts is None or len(row.counts)) for row in (one, other)]
    if seen[0] != seen[1]:
        return start
    same = min(
        _num_equal(one.image_features, other.image_features),
        _num_equal(one.keep_indices, other.keep_indices),
    )
    return start + same


def _num_equal(one: NDArray[Any], other: NDArray[Any]) -> int:
    """How many first rows are the same."""
    length = min(len(one), len(other))
    if one is other:
        return length
    differs = (one[:length] != other[:length]).reshape(length, -1).any(axis=1)
    return int(differs.argmax()) if differs.any() else length
