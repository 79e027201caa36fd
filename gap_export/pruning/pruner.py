"""What a pruner is: something that says which visual tokens survive.

Shape letters: B rows, N visual tokens before pruning, K kept, D vision features, H the decoder's
hidden size, C width of a key, E CLIP embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gap_export.pruning.select import gather_tokens, rank_tokens
from gap_export.spec.manifest import ExtraToken, GridSpec, Order

if TYPE_CHECKING:
    import torch

Reading = Literal[
    "cls_features",
    "cls_attention",
    "received_attention",
    "keys",
    "next_layer",
    "text",
    "llm_text",
    "image_embeds",
    "places",
    "rope_sums",
]

# Either needs one vector of the text, of another space each.
TEXT_READINGS: frozenset[Reading] = frozenset({"text", "llm_text"})


@dataclass(frozen=True, kw_only=True)
class VisionState:
    """What a vision encoder shows to a pruner; a part that the pruner does not read is None.

    Attributes:
        patch_features: float [B, N, D], at the select layer.
        cls_features: float [B, D], of the CLS token at the same layer.
        cls_attention: float [B, N], attention of CLS to each patch, averaged over the heads, in the
            layer that produced the features.
        received_attention: float [B, N], attention that each patch receives in that layer: the mean
            over heads and queries, then over the patches of a token.
        keys: float [B, N, C], the keys of that layer, averaged over the heads.
        next_attention: float [B, N], attention of CLS to each patch in the layer behind the select
            layer, as one head of the full width; the CLS column left out after the softmax.
        next_keys: float [B, N, D], the keys of that layer, all heads side by side.
        image_embeds: float [B, N, H], the patches projected to what the decoder reads.
        patch_embeds: float [B, N, E], patches in CLIP's joint space.
        text_embeds: float [B, E], the expression or question in CLIP's joint space.
        word_embeds: float [B, H], the expression or question as the decoder reads its words: the
            mean of their unit vectors, so that a product with it is a mean of cosines.
        places: int64 [N, 2], row and column of each token in its grid.
        rope_sums: float [N, 2], sums of the cosines and of the sines of the angles that the
            decoder's RoPE turns a token by, see :func:`gap_export.spec.places.rope_sums`.
        text_similarity_sign: +1 or -1; -1 where patch-text similarity is inverted.
    """

    patch_features: torch.Tensor
    cls_features: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None
    received_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    next_attention: torch.Tensor | None = None
    next_keys: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    patch_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    word_embeds: torch.Tensor | None = None
    places: torch.Tensor | None = None
    rope_sums: torch.Tensor | None = None
    text_similarity_sign: int = 1


class Pruner(ABC):
    """Common to all pruners.

    Attributes:
        summary: One line.
        reads: Parts of the vision state it needs; a model that lacks one cannot serve it.
        uses_seed: Whether it draws.
        orders: Orders it can emit; ``score`` needs something to rank by.
        extra_tokens: Extra tokens it can add; ``weighted`` needs scores.
    """

    summary: ClassVar[str]
    reads: ClassVar[frozenset[Reading]] = frozenset()
    uses_seed: ClassVar[bool] = False
    orders: ClassVar[tuple[Order, ...]] = ("raster", "score")
    extra_tokens: ClassVar[tuple[ExtraToken, ...]] = ("none", "mean")

    @property
    def reads_text(self) -> bool:
        """Whether it reads the expression or the question, in one space or the other."""
        return not self.reads.isdisjoint(TEXT_READINGS)


class ScoringPruner(Pruner):
    """Ranks the tokens of each image by a score."""

    extra_tokens: ClassVar[tuple[ExtraToken, ...]] = ("none", "mean", "weighted")
    # What :meth:`merge` reads beside the features and the scores.
    merges_by: ClassVar[Literal["keys", "next_keys"] | None] = None

    @abstractmethod
    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N], higher is better."""

    def priorities(self, scores: torch.Tensor, *, num_kept_tokens: int) -> torch.Tensor:
        """int64 [B, N] without repeats in a row: the K smallest survive, the smallest goes first.

        By default the best K by score, of equals the lower index.
        """
        del num_kept_tokens
        return rank_tokens(scores)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Float [B, N], 0 or more, at most 1 in a row's sum: weights of a ``weighted`` extra token.

        By default a softmax; a pruner whose scores are such weights gives them as they are.
        """
        import torch

        return torch.softmax(scores, dim=-1)

    def merge(
        self, state: VisionState, scores: torch.Tensor, keep_indices: torch.Tensor
    ) -> torch.Tensor:
        """Features of the survivors, float [B, K, D]; by default as they are.

        Args:
            state: ``patch_features``, and what ``merges_by`` names.
            scores: From :meth:`scores`.
            keep_indices: int64 [B, K], in any order.
        """
        del scores
        return gather_tokens(state.patch_features, keep_indices)


class ChoosingPruner(Pruner):
    """Takes one token after the other, each choice depending on those before it."""

    @abstractmethod
    def choose(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor:
        """int64 [B, K] of 0..N-1 without repeats in a row, in the order of choice."""

    def margins(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor | None:
        """By how much the closest of its K choices was decided, float [B]; not for graphs.

        None, the default, where that is not known.
        """
        del state, num_kept_tokens
        return None


class FixedPruner(Pruner):
    """Keeps the same places in every image; they become a constant of the graph."""

    @abstractmethod
    def places(
        self, grid: GridSpec, *, num_kept_tokens: int, seed: int | None
    ) -> NDArray[np.int64]:
        """int64 [K] of 0..N-1 without repeats, best first where the pruner knows a best."""


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: half precision has too few digits to rank by."""
    import torch

    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def dot(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Products of each of ``rows`` [B, N, D] with ``vector`` [B, D]: [B, N].

    Added up by hand: a GPU of SM 75 multiplies no matrices in float32.
    """
    return (rows * vector[:, None, :]).sum(dim=-1)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, [..., D]; a zero vector stays one, so that its cosines are 0, not NaN."""
    vectors = wide(vectors)
    norm = vectors.pow(2).sum(dim=-1, keepdim=True).sqrt()
    return vectors / norm.clamp(min=1e-8)


def share_of_largest(values: torch.Tensor) -> torch.Tensor:
    """Values 0 or more, [B, N], as shares of the largest of their row; zeros stay zeros."""
    return values / values.amax(dim=1, keepdim=True).clamp(min=1e-12)
