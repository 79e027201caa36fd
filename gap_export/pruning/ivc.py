"""``ivc-extent``, ``ivc-text-llm``: where RoPE turns least, beside what another pruner keeps.

IVC-Prune (arXiv 2602.03060) keeps tokens that serve a model as origins of coordinates: those whose
rotation is nearly none or nearly a quarter turn, which follows from their ids alone. They go with
any choice by content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.extent import ExtentPruner
from gap_export.pruning.pruner import (
    ChoosingPruner,
    Reading,
    ScoringPruner,
    VisionState,
)
from gap_export.pruning.select import rank_tokens, take_smallest
from gap_export.pruning.text import LlmTextPruner

if TYPE_CHECKING:
    import torch


class IvcPruner(ChoosingPruner):
    """A fifth of K, rounded half up, are origins; the rest are the other pruner's first choices.

    Origins are taken in turn: of the largest sum of cosines, of the largest sum of sines, of the
    next largest sum of cosines; one that both give counts once. A fifth, since the paper keeps a
    tenth of all tokens as origins where it keeps half of all.

    Attributes:
        beside: The other pruner.
    """

    beside: ClassVar[ScoringPruner | ChoosingPruner]

    def choose(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor:
        """int64 [B, K], origins first."""
        import torch

        assert state.rope_sums is not None
        num_tokens = state.patch_features.shape[1]
        num_origins = (2 * num_kept_tokens + 5) // 10
        by_sum = 2 * rank_tokens(state.rope_sums.transpose(0, 1))
        origin = rank_tokens(-torch.minimum(by_sum[:1], by_sum[1:] + 1))
        if isinstance(self.beside, ScoringPruner):
            place = rank_tokens(self.beside.scores(state))
        else:
            chosen = self.beside.choose(state, num_kept_tokens=num_kept_tokens)
            place = _places_among(chosen, num_tokens)
        priorities = torch.where(origin < num_origins, origin, num_tokens + place)
        return take_smallest(priorities, num_kept_tokens=num_kept_tokens, order="score")

    def margins(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor | None:
        """See ChoosingPruner: the other pruner's; origins are the same in every runtime."""
        if isinstance(self.beside, ChoosingPruner):
            return self.beside.margins(state, num_kept_tokens=num_kept_tokens)
        return None


class IvcExtentPruner(IvcPruner):
    """Beside ``extent``."""

    summary: ClassVar[str] = "origins of RoPE's coordinates, then as extent"
    beside: ClassVar[ScoringPruner | ChoosingPruner] = ExtentPruner()
    reads: ClassVar[frozenset[Reading]] = ExtentPruner.reads | {"rope_sums"}


class LlmIvcPruner(IvcPruner):
    """Beside ``text-llm``: the paper's other tokens, too, are those that fit the text.

    The paper compares values of a layer of the LLM, and then those of the best once more, which is
    not known before the LLM.
    """

    summary: ClassVar[str] = "origins of RoPE's coordinates, then as text-llm"
    beside: ClassVar[ScoringPruner | ChoosingPruner] = LlmTextPruner()
    reads: ClassVar[frozenset[Reading]] = LlmTextPruner.reads | {"rope_sums"}


def _places_among(chosen: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Of each of N tokens its place in ``chosen`` int64 [B, K]; N of one that is not there."""
    import torch

    order = torch.arange(chosen.shape[1], device=chosen.device)[:, None]
    index = torch.arange(num_tokens, device=chosen.device)
    return torch.where(chosen[:, :, None] == index, order, num_tokens).amin(dim=1)
