"""``text`` and ``text-llm``: tokens that fit the expression.

``text`` is GAP's baseline (arXiv 2506.21873); its score is TRIM's (arXiv 2409.10994), without its
softmax and its extra token. ``text-llm`` asks the decoder's words instead of a CLIP text tower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.pruner import Reading, ScoringPruner, VisionState, dot, unit, wide

if TYPE_CHECKING:
    import torch


class TextPruner(ScoringPruner):
    """Dot product of patch and text in CLIP's joint space, not normalised, times the recipe's sign.

    The text's length is common to all patches, but a patch's is not: normalising would give
    another pruner.
    """

    summary: ClassVar[str] = "patches that fit the expression, by the CLIP text tower"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N]."""
        assert state.patch_embeds is not None
        assert state.text_embeds is not None
        patches, text = wide(state.patch_embeds), wide(state.text_embeds)
        return state.text_similarity_sign * dot(patches, text)


class LlmTextPruner(ScoringPruner):
    """Mean cosine of a projected patch and the words of the text, both as the decoder reads them.

    It needs no text tower. OpenVINO GenAI judges relevance so in its CDPruner for models without
    one (``RelevanceCalculator`` in its sources); nothing trained the two to be alike.
    """

    summary: ClassVar[str] = "patches that fit the expression, by the decoder's word embeddings"
    reads: ClassVar[frozenset[Reading]] = frozenset({"llm_text", "image_embeds"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N] in -1..1."""
        return word_cosines(state)


def word_cosines(state: VisionState) -> torch.Tensor:
    """Mean cosine of each projected patch and the text's words: float [B, N]."""
    assert state.image_embeds is not None
    assert state.word_embeds is not None
    return dot(unit(state.image_embeds), wide(state.word_embeds))
