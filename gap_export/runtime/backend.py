"""What runs the graphs of a bundle. Arrays are numpy at this boundary.

Floats go in and come out in whatever precision the model has, bfloat16 as float32; a backend casts
what it is fed to what its graphs declare.

Shape letters: B rows (expressions), I images (1, B or the tiles of one picture), T tokens, S fed
tokens, P prompt tokens after pruning, K' emitted visual tokens, H hidden size, D text embedding
size, V vocabulary.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.positions import Int64Array

if TYPE_CHECKING:
    from typing_extensions import Self

FloatArray = NDArray[np.floating[Any]]


class EncodedImage(NamedTuple):
    """What a vision encoder gives.

    Attributes:
        image_features: [I|B, K', H].
        keep_indices: int64 [I|B, K'], the index among the unpruned visual tokens of the picture, or
            tile, of each emitted one.
        token_scores: float32 [I|B, N], of a pruner that has scores.
    """

    image_features: FloatArray
    keep_indices: Int64Array
    token_scores: FloatArray | None = None


class ScoredImage(NamedTuple):
    """What a vision encoder gives where each picture decides how many of its tokens are kept.

    Attributes:
        token_scores: float32 [I|B, N].
        patch_features: [I|B, N, D].
        patch_keys: [I|B, N, C] of a pruner that merges, else None.
    """

    token_scores: FloatArray
    patch_features: FloatArray
    patch_keys: FloatArray | None = None

    def feed(self, *, num_kept_tokens: int) -> dict[str, NDArray[Any]]:
        """The inputs of the graph that keeps ``num_kept_tokens`` of each row."""
        parts = {name: part for name, part in self._asdict().items() if part is not None}
        return parts | {"num_kept_tokens": np.array([num_kept_tokens], dtype=np.int64)}


class KVCache(Protocol):
    """The decoder's memory of one batch. Its content belongs to the backend that made it."""

    @property
    def batch_size(self) -> int:
        """B."""
        ...

    @property
    def length(self) -> int:
        """Slots filled so far, padding included."""
        ...


class Backend(Protocol):
    """Runs a model's components; a context manager, closed once."""

    @property
    def name(self) -> str:
        """What runs, for reports, e.g. ``ONNX Runtime 1.32.0 (CPUExecutionProvider)``."""
        ...

    @property
    def dtype(self) -> str:
        """Of the floats it computes with: float32, float16 or bfloat16."""
        ...

    @property
    def quantization(self) -> QuantizationSpec | None:
        """Of the decoder's weights; None where they have the dtype of the floats."""
        ...

    def __enter__(self) -> Self:
        """Return itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free what it holds."""
        ...

    def encode_text(self, input_ids: Int64Array) -> FloatArray:
        """Text tower of pruners that read the text.

        Args:
            input_ids: int64 [B, T'], rows of one length, no padding.

        Returns:
            text_embeds [B, D].
        """
        ...

    def encode_image(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> EncodedImage:
        """Vision tower, pruner and projector.

        Args:
            pixel_values: float32 [I, 3, height, width].
            text_embeds: [B, D] where the pruner reads the text, else None. For tiles B is I: one
                expression's embedding, repeated.
        """
        ...

    def score_tokens(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> ScoredImage:
        """Vision tower and scores, where the budget is adaptive; see :meth:`encode_image`."""
        ...

    def prune_tokens(self, scored: ScoredImage, *, num_kept_tokens: int) -> EncodedImage:
        """Pruner and projector, where the budget is adaptive.

        Args:
            scored: From :meth:`score_tokens`, or some of its rows.
            num_kept_tokens: K, of each row.
        """
        ...

    def image_newline(self) -> FloatArray:
        """What stands at the end of each row of a picture cut into tiles: [H]."""
        ...

    def embed_tokens(self, input_ids: Int64Array) -> FloatArray:
        """Word embeddings: int64 [B, T] -> [B, T, H]."""
        ...

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for a batch."""
        ...

    def decode(
        self,
        *,
        inputs_embeds: FloatArray,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        kept_positions: Int64Array,
        cache: KVCache,
    ) -> FloatArray:
        """One step of the decoder; the cache grows by S slots.

        Args:
            inputs_embeds: [B, S, H].
            attention_mask: int64 [B, past + S], 0 for padding.
            position_ids: int64 [B, S], slots.
            kept_positions: int64 [B, P], or [A, B, P] where positions have several axes: the
                graph's input of that name, ``DecoderPrompt.id_table``.
            cache: From :meth:`new_cache` of this backend.

        Returns:
            logits [B, V] of the last of the S tokens.
        """
        ...
