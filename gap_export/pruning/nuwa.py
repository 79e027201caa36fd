"""``nuwa``: the best tokens of each small region of the image (Nuwa, arXiv 2602.02951).

These are its spatial anchors alone. What the paper does besides is left out: it adds neighbors'
features to three quarters of them, and takes some away inside the LLM, by the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from gap_export.pruning.pruner import (
    ChoosingPruner,
    Reading,
    VisionState,
    share_of_largest,
    wide,
)
from gap_export.pruning.select import is_among, rank_tokens, take_smallest

if TYPE_CHECKING:
    import torch

_REGION = 2


class NuwaPruner(ChoosingPruner):
    """Of each region of 2 x 2 tokens the most salient, then of each the next, until there are K.

    Salience is the attention of CLS times the length of the token's key, here averaged over the
    heads. Where K is not as many of each region, the paper leaves open which regions give one more:
    here those whose next token is the most salient. At the end of an odd row or column, regions are
    smaller.

    Attributes:
        attention: Whose attention it ranks by.
    """

    attention: ClassVar[Literal["cls_attention", "received_attention"]] = "cls_attention"

    summary: ClassVar[str] = "patches the CLS token attends to, evenly from all of the image"
    reads: ClassVar[frozenset[Reading]] = frozenset({"cls_attention", "keys", "places"})

    def choose(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor:
        """int64 [B, K], turn after turn."""
        salience = self._salience(state)
        places = rank_tokens(salience - 2 * _turns(salience, _same_region(state)))
        return take_smallest(places, num_kept_tokens=num_kept_tokens, order="score")

    def margins(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor:
        """See ChoosingPruner; in shares of the largest salience.

        A token that is dropped may have been dropped for one of its region, or for one of its turn.
        """
        import torch

        salience, same_region = self._salience(state), _same_region(state)
        turns = _turns(salience, same_region)
        kept = self.choose(state, num_kept_tokens=num_kept_tokens)
        is_kept = is_among(kept, salience.shape[1])
        decided = is_kept[:, :, None] & ~is_kept[:, None, :]
        decided &= same_region | (turns[:, :, None] == turns[:, None, :])
        apart = salience[:, :, None] - salience[:, None, :]
        return torch.where(decided, apart, torch.inf).flatten(1).amin(dim=1)

    def _salience(self, state: VisionState) -> torch.Tensor:
        """Float [B, N] in 0..1, the largest of an image 1."""
        attention: torch.Tensor | None = getattr(state, self.attention)
        assert attention is not None
        assert state.keys is not None
        lengths = wide(state.keys).pow(2).sum(dim=-1).sqrt()
        return share_of_largest(wide(attention) * lengths)


class NuwaReceivedPruner(NuwaPruner):
    """Nuwa's rule on the attention that a token receives, for towers without a CLS token."""

    summary: ClassVar[str] = "as nuwa, by the attention that all tokens give; needs no CLS"
    reads: ClassVar[frozenset[Reading]] = frozenset({"received_attention", "keys", "places"})
    attention: ClassVar[Literal["cls_attention", "received_attention"]] = "received_attention"


def _same_region(state: VisionState) -> torch.Tensor:
    """Which tokens are of one region: bool [N, N]."""
    import torch

    assert state.places is not None
    # TensorRT for RTX fails on this in whole numbers.
    region = (state.places.to(torch.float32) / _REGION).floor()
    return (region[:, None] - region).abs().sum(dim=-1) == 0


def _turns(salience: torch.Tensor, same_region: torch.Tensor) -> torch.Tensor:
    """How many of its region come before a token: int64 [B, N]."""
    import torch

    index = torch.arange(salience.shape[1], device=salience.device)
    mine, other = salience[:, :, None], salience[:, None, :]
    is_before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return (is_before & same_region).to(torch.int64).sum(dim=-1)
