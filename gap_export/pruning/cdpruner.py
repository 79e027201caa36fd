"""``cdpruner``, ``cdpruner-llm``: tokens that fit and differ (CDPruner, arXiv 2506.10967)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.greedy import Choices, GreedyPruner, rows_at
from gap_export.pruning.pruner import Reading, VisionState, unit
from gap_export.pruning.text import word_cosines

if TYPE_CHECKING:
    import torch

# Keeps the kernel positive where a token fits least.
_LEAST_RELEVANCE = 1e-6
# What is left of a token that those chosen explain completely, rounding aside.
_NOTHING_LEFT = 1e-12


class CdPruner(GreedyPruner):
    """Determinantal point process, its most probable set found greedily (arXiv 1709.05135).

    The kernel is r_i cos(P x_i, P x_j) r_j, where r is the cosine of patch and text in CLIP's joint
    space times the recipe's sign, brought to 0..1 within an image. Each choice takes the largest
    diagonal element and leaves the Schur complement. The text is the whole question; of one longer
    than CLIP reads the cosines with its segments are averaged.
    """

    summary: ClassVar[str] = "patches that fit the question, as unlike each other as can be"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text", "image_embeds"})

    def start(self, state: VisionState, *, num_kept_tokens: int) -> Choices:
        """See GreedyPruner; merits are what is left of relevance squared, at most about 1."""
        import torch

        del num_kept_tokens
        assert state.image_embeds is not None
        embeds, relevance = unit(state.image_embeds), _relevance(self.fits(state))
        similarity = torch.matmul(embeds, embeds.transpose(1, 2))
        kernel = relevance[:, :, None] * similarity * relevance[:, None, :]
        index = torch.arange(embeds.shape[1], device=embeds.device)

        def follow(
            merits: torch.Tensor, left: torch.Tensor, chosen: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            own = merits.amax(dim=1, keepdim=True).clamp(min=_NOTHING_LEFT)
            # No element is larger than the root of its two on the diagonal. Where nothing is left
            # rounding makes one so, and it would grow from choice to choice until it is no number.
            most = (own * merits.clamp(min=0)).sqrt()
            row = torch.minimum(torch.maximum(rows_at(left, chosen), -most), most)
            left = left - row[:, :, None] * (row / own)[:, None, :]
            return merits - row * (row / own), left

        diagonal = torch.where(index[:, None] == index, kernel, 0.0).sum(dim=2)
        return Choices(diagonal, kernel, follow)

    def fits(self, state: VisionState) -> torch.Tensor:
        """How well each token fits the text, float [B, N]; only differences count."""
        import torch

        assert state.patch_embeds is not None
        assert state.text_embeds is not None
        text = unit(state.text_embeds)[:, :, None]
        return state.text_similarity_sign * torch.matmul(unit(state.patch_embeds), text)[:, :, 0]


class LlmCdPruner(CdPruner):
    """CDPruner where there is no CLIP text tower: r is the mean cosine with the decoder's words.

    So OpenVINO GenAI has it for such models, see :class:`LlmTextPruner`.
    """

    summary: ClassVar[str] = "as cdpruner, of the expression, by the decoder's word embeddings"
    reads: ClassVar[frozenset[Reading]] = frozenset({"llm_text", "image_embeds"})

    def fits(self, state: VisionState) -> torch.Tensor:
        """See CdPruner."""
        return word_cosines(state)


def _relevance(fits: torch.Tensor) -> torch.Tensor:
    """Float [B, N] above 0, at most about 1."""
    least, most = fits.amin(dim=1, keepdim=True), fits.amax(dim=1, keepdim=True)
    # All alike: nothing to tell them apart by.
    return (fits - least + _LEAST_RELEVANCE) / (most - least).clamp(min=_LEAST_RELEVANCE)
