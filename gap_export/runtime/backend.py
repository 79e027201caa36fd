"""What runs the four graphs of a bundle. Arrays are numpy at this boundary.

Floats go in and come out in whatever precision the model has, bfloat16 as float32; a backend casts
what it is fed to what its graphs declare.

Shape letters: B rows (expressions), I images (1, B or the tiles of one picture), T tokens, S fed
tokens, P prompt tokens after pruning, K' emitted visual tokens, H hidden size, D text embedding
size, V vocabulary.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gap_export.manifest import QuantizationSpec
from gap_export.positions import Int64Array

if TYPE_CHECKING:
    from typing_extensions import Self

FloatArray = NDArray[np.floating[Any]]


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
    ) -> tuple[FloatArray, Int64Array]:
        """Vision tower, pruner and projector.

        Args:
            pixel_values: float32 [I, 3, height, width].
            text_embeds: [B, D] where the pruner reads the text, else None. For tiles B is I: one
                expression's embedding, repeated.

        Returns:
            image_features [I|B, K', H] and keep_indices int64 [I|B, K'], the index among the
            unpruned visual tokens of the picture, or tile, of each emitted one.
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
            kept_positions: int64 [B, P], see ``gap_export.positions``.
            cache: From :meth:`new_cache` of this backend.

        Returns:
            logits [B, V] of the last of the S tokens.
        """
        ...
