"""What a pruner is: something that says which visual tokens survive.

Shape letters: B rows, N visual tokens before pruning, K kept, D vision features, E CLIP embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gap_export.manifest import GridSpec

Reading = Literal["cls_features", "cls_attention", "text"]
Order = Literal["raster", "score"]


@dataclass(frozen=True, kw_only=True)
class VisionState:
    """What a vision encoder shows to a pruner; a part nobody asked for is None.

    Attributes:
        patch_features: float [B, N, D], at the select layer.
        cls_features: float [B, D], of the CLS token at the same layer.
        cls_attention: float [B, N], attention of CLS to each patch, averaged over the heads, in the
            layer that produced the features.
        patch_embeds: float [B, N, E], patches in CLIP's joint space.
        text_embeds: float [B, E], the expression in CLIP's joint space.
        text_similarity_sign: +1 or -1; -1 where patch-text similarity is inverted.
    """

    patch_features: torch.Tensor
    cls_features: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None
    patch_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    text_similarity_sign: int = 1


class Pruner(ABC):
    """Common to all pruners.

    Attributes:
        name: What the command line calls it.
        summary: One line.
        reads: Parts of the vision state it needs; a model that lacks one cannot serve it.
        uses_seed: Whether it draws.
        orders: Orders it can emit; ``score`` needs something to rank by.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reads: ClassVar[frozenset[Reading]] = frozenset()
    uses_seed: ClassVar[bool] = False
    orders: ClassVar[tuple[Order, ...]] = ("raster", "score")


class ScoringPruner(Pruner):
    """Ranks the tokens of each picture; the best K survive, ties going to the lower index."""

    @abstractmethod
    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N], higher is better."""


class FixedPruner(Pruner):
    """Keeps the same places in every picture; they become a constant of the graph."""

    @abstractmethod
    def places(
        self, grid: GridSpec, *, num_kept_tokens: int, seed: int | None
    ) -> NDArray[np.int64]:
        """int64 [K] of 0..N-1 without repeats, best first where the pruner knows a best."""
