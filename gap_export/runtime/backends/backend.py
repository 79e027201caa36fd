"""What runs the components of a model. Arrays are numpy at this boundary.

A component is a graph of the bundle, or :data:`NEWLINE`, a tensor that it holds. Inputs and outputs
go by the graph's own names, so that a new input of a model needs no change here. Floats come out in
the precision of the graph, bfloat16 as float32; a backend casts what it is fed.

Shape letters: B rows (expressions), I images (1, B or the tiles of one image), T tokens, S fed
tokens, P prompt tokens after pruning, K' emitted visual tokens, N unpruned visual tokens, H hidden
size, D text embedding size, V vocabulary. The components, with what a session feeds and reads:

* ``text_encoder``, of pruners that read a text tower: input_ids int64 [B, T'] -> text_embeds
  [B, D].
* ``vision_encoder``: pixel_values float32 [I, 3, height, width] (, text_embeds [B, D]) ->
  image_features [I|B, K', H], keep_indices int64 [I|B, K'] (, token_scores float32 [I|B, N]); with
  an adaptive budget -> token_scores, patch_features [I|B, N, D] (, patch_keys [I|B, N, C]).
* ``token_pruner``, with an adaptive budget: those, and num_kept_tokens int64 [1] ->
  image_features, keep_indices.
* ``newline``, of images cut into tiles: nothing -> image_newline [H], the end of a row of tokens.
* ``embed_tokens``: input_ids int64 [B, T] -> inputs_embeds [B, T, H].
* ``decoder_model_merged``, by :meth:`Backend.decode`: inputs_embeds [B, S, H], attention_mask int64
  [B, past + S] (0 for padding), position_ids int64 [B, S] (slots), kept_positions int64 [B, P], or
  [A, B, P] where positions have A axes (``DecoderPrompt.id_table``) -> logits [B, V] of the last of
  the S tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import UsageError
from gap_export.spec.manifest import Activations, Manifest, QuantizationSpec
from gap_export.spec.requests import InferencePrecision

if TYPE_CHECKING:
    from typing_extensions import Self

FloatArray = NDArray[np.floating[Any]]
Feed = Mapping[str, NDArray[Any]]
Outputs = dict[str, NDArray[Any]]

VISION, TEXT, EMBEDDING = "vision_encoder", "text_encoder", "embed_tokens"
PRUNER, DECODER, NEWLINE = "token_pruner", "decoder_model_merged", "newline"
# An input that a decoder has not where it holds what would be fed.
BAKED = "kept_positions"


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


class Backend(ABC):
    """Runs a model's components; a context manager, closed once.

    Attributes:
        name: What runs, for reports, e.g. ``ONNX Runtime 1.32.0 (CPUExecutionProvider)``.
        dtype: The floats it computes with: float32, float16 or bfloat16.
        quantization: How the decoder's weights are quantized; None where they are floats.
        continues_prompts: Whether :meth:`decode` takes several tokens behind a filled cache, and
            :meth:`fork_cache` is there; else each prompt is read at once.
        num_logits: Of how many of the tokens fed last :meth:`decode_each` gives logits.
        activations: What goes into the layers of those weights.
        inference_precision: What it computes in, where that is less than the graph's floats.
    """

    name: str
    dtype: str
    quantization: QuantizationSpec | None = None
    continues_prompts: bool = False
    num_logits: int = 1
    activations: Activations = "float"
    inference_precision: InferencePrecision = "float32"

    @property
    def max_batch(self) -> int | None:
        """The most rows that it takes at a time; None where any number fits."""
        return None

    @abstractmethod
    def run(self, component: str, feed: Feed) -> Outputs:
        """Run any component but the decoder.

        Raises:
            UsageError: the model has no such component, or it cannot be run at this size.
        """

    @abstractmethod
    def new_cache(self, batch_size: int, num_slots: int) -> KVCache:
        """An empty cache for a batch.

        Args:
            batch_size: B.
            num_slots: The most it will ever hold, padding included, so that memory can be had once.
        """

    def fork_cache(self, cache: KVCache, batch_size: int, num_slots: int) -> KVCache:
        """A cache whose rows all begin as the one row of another, which stays as it is.

        Args:
            cache: Of this backend, with batch size 1.
            batch_size: Rows of the new one.
            num_slots: The most it will ever hold, those of ``cache`` included.

        Raises:
            UsageError: this backend does not continue prompts.
        """
        raise UsageError(
            "this backend reads a prompt at once",
            seen=f"{cache.length} tokens for {batch_size} rows of {num_slots} to go on from",
        )

    @abstractmethod
    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """Run the decoder for S tokens, by which the cache grows; the logits of the last, [B, V].

        Args:
            feed: The decoder's inputs, without those of the cache.
            cache: From :meth:`new_cache` or :meth:`fork_cache` of this backend.
        """

    def decode_each(self, feed: Feed, cache: KVCache) -> FloatArray:
        """As :meth:`decode`, of one row, with the logits of each of the S tokens, [S, V].

        Args:
            feed: As of :meth:`decode`, with B = 1, S of at most ``num_logits``, and none hidden.
            cache: As of :meth:`decode`.
        """
        return self.decode(feed, cache)

    def close(self) -> None:  # noqa: B027, most backends hold nothing
        """Free what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def graph_components(manifest: Manifest) -> list[str]:
    """The graphs that a session of this model runs."""
    reader, adapts = manifest.text_encoder, manifest.pruning.budget == "adaptive"
    reads_text = reader is not None and reader.component == TEXT
    wanted = {VISION: True, PRUNER: adapts, TEXT: reads_text, EMBEDDING: True, DECODER: True}
    return [component for component, is_there in wanted.items() if is_there]


def lacks_component(component: str, manifest: Manifest) -> UsageError:
    """The error for a component that a model has not got."""
    return UsageError(
        "this model has no such component",
        seen=component,
        allowed=", ".join(graph_components(manifest)),
    )
