"""``extent`` with a term left out, exchanged or added: what it is made of, one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gap_export.pruning import ScoringPruner, VisionState
from gap_export.pruning.extent import ExtentPruner, LlmExtentPruner, between, norms
from gap_export.pruning.greedy import Choices, GreedyPruner, rows_at
from gap_export.pruning.pruner import unit

Term = Callable[[VisionState, tuple[int, int]], torch.Tensor]


class NormAlone(ScoringPruner):
    """The tokens of largest norm."""

    summary = "norm alone"
    reads = frozenset({"image_embeds"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N]."""
        return norms(state)


class OtherWeights(ExtentPruner):
    """Weights of one's own in place of extent's, or times them.

    Args:
        term: What counts, [B, N].
        grid: Rows and columns of the tokens.
        least: Of the token that counts least.
        beside: Whether extent's own weights stay.
    """

    summary = "other weights"

    def __init__(
        self, term: Term, grid: tuple[int, int], *, least: float = 0.4, beside: bool = False
    ) -> None:
        self._term, self._grid, self._least, self._beside = term, grid, least, beside

    def weights(self, state: VisionState) -> torch.Tensor:
        """Float [B, N]."""
        found = between(self._term(state, self._grid), self._least)
        return found * super().weights(state) if self._beside else found


class WithPlaces(ExtentPruner):
    """Distances in the image beside those of features.

    Args:
        grid: Rows and columns of the tokens.
        share: Of the distance of two opposite sides.
    """

    summary = "places, too"

    def __init__(self, grid: tuple[int, int], share: float) -> None:
        self._grid, self._share = grid, share

    def distances(self, state: VisionState) -> torch.Tensor:
        """Float [B, N, N]."""
        rows, cols = self._grid
        index = torch.arange(rows * cols)
        places = torch.stack([index // cols / rows, index % cols / cols], dim=1)
        return super().distances(state) + self._share * torch.cdist(places, places)


class Volume(GreedyPruner):
    """The largest determinant, as CDPruner has it, with extent's weights for relevance."""

    summary = "volume in place of distances"

    def start(self, state: VisionState, *, num_kept_tokens: int) -> Choices:
        """See GreedyPruner."""
        del num_kept_tokens
        assert state.image_embeds is not None
        embeds, weights = unit(state.image_embeds), ExtentPruner().weights(state)
        scaled = weights[:, :, None] * embeds
        kernel = torch.matmul(scaled, scaled.transpose(1, 2))

        def follow(
            merits: torch.Tensor, left: torch.Tensor, chosen: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            own = merits.amax(dim=1, keepdim=True).clamp(min=1e-12)
            row = rows_at(left, chosen)
            return merits - row * row / own, left - row[:, :, None] * (row / own)[:, None, :]

        return Choices(kernel.diagonal(dim1=1, dim2=2).clone(), kernel, follow)


def outline(state: VisionState, grid: tuple[int, int]) -> torch.Tensor:
    """Mean distance of a token from its up to four neighbours in the grid, [B, N]."""
    assert state.image_embeds is not None
    rows, cols = grid
    embeds = unit(state.image_embeds)
    cells = embeds.reshape(len(embeds), rows, cols, -1)
    total, count = torch.zeros(cells.shape[:3]), torch.zeros(rows, cols)
    for axis in (1, 2):
        ends = cells.shape[axis] - 1
        apart = 1 - (cells.narrow(axis, 0, ends) * cells.narrow(axis, 1, ends)).sum(dim=-1)
        for first in (0, 1):
            total.narrow(axis, first, ends).add_(apart)
            count.narrow(axis - 1, first, ends).add_(1)
    return (total / count).flatten(1)


def inside(state: VisionState, grid: tuple[int, int]) -> torch.Tensor:
    """The opposite of :func:`outline`."""
    return -outline(state, grid)


def rarity(state: VisionState, _: tuple[int, int]) -> torch.Tensor:
    """One minus the mean cosine with all tokens of the image, [B, N]."""
    assert state.image_embeds is not None
    embeds = unit(state.image_embeds)
    return 1 - torch.matmul(embeds, embeds.mean(dim=1)[:, :, None])[:, :, 0]


def attention(state: VisionState, _: tuple[int, int]) -> torch.Tensor:
    """Attention of CLS where there is one, else what all tokens give, [B, N]."""
    found = state.received_attention if state.cls_attention is None else state.cls_attention
    assert found is not None
    return found


def norm(state: VisionState, _: tuple[int, int]) -> torch.Tensor:
    """Extent's own."""
    return norms(state)


def all_terms(grid: tuple[int, int]) -> dict[str, ScoringPruner | GreedyPruner]:
    """By what is done to ``extent``."""

    def other(term: Term, least: float = 0.4, *, beside: bool = False) -> OtherWeights:
        return OtherWeights(term, grid, least=least, beside=beside)

    return {
        "`extent`": ExtentPruner(),
        "least weight 0.2": other(norm, 0.2),
        "least weight 0.6": other(norm, 0.6),
        "least weight 1: distances alone": other(norm, 1.0),
        "norm alone": NormAlone(),
        "rarity in place of the norm": other(rarity),
        "attention in place of the norm": other(attention),
        "times outlines": other(outline, 0.5, beside=True),
        "times what is inside": other(inside, 0.5, beside=True),
        "places in the distance, 0.1": WithPlaces(grid, 0.1),
        "places in the distance, 1": WithPlaces(grid, 1.0),
        "volume in place of distances": Volume(),
        "`extent-llm`": LlmExtentPruner(),
    }
