"""A look at what another package's pruner does, before a graph is made of it."""

from __future__ import annotations

import torch

from gap_export.errors import GapExportError
from gap_export.keep_indices import check_keep_indices
from gap_export.manifest import PruningSpec
from gap_export.pruning.pruner import ChoosingPruner, Pruner, ScoringPruner, VisionState

_ROWS, _WIDTH = 2, 8


def probe_pruner(pruner: Pruner, pruning: PruningSpec) -> None:
    """Let a pruner choose from random tokens, and check what it chooses.

    A graph cannot say no when it runs, so what it would do wrong is looked for here.

    Args:
        pruner: Not a fixed one, whose places are checked themselves.
        pruning: How many of how many.

    Raises:
        GapExportError: it does not choose K different tokens of 0..N-1, or scores that are no
            numbers.
    """
    with torch.device("cpu"), torch.inference_mode():
        state = _random_state(pruning.num_visual_tokens)
        count = pruning.num_kept_tokens
        if isinstance(pruner, ChoosingPruner):
            chosen = pruner.choose(state, num_kept_tokens=count)
        else:
            assert isinstance(pruner, ScoringPruner)
            scores = pruner.scores(state)
            _check_scores(scores, pruning)
            priorities = pruner.priorities(scores, num_kept_tokens=count)
            chosen = torch.topk(priorities, count, dim=1, largest=False).indices
    if chosen.ndim != 2 or chosen.shape[0] != _ROWS:
        raise GapExportError(
            f"pruner {pruning.pruner} does not choose for each row",
            seen=f"shape {list(chosen.shape)}",
            allowed=f"[B, {count}]",
        )
    for row in chosen.numpy():
        check_keep_indices(
            row,
            num_visual_tokens=pruning.num_visual_tokens,
            num_kept_tokens=count,
            ascending=False,
            error=GapExportError,
            who=f"pruner {pruning.pruner}",
        )


def _check_scores(scores: torch.Tensor, pruning: PruningSpec) -> None:
    wanted = (_ROWS, pruning.num_visual_tokens)
    fits = tuple(scores.shape) == wanted
    if not fits or not bool(torch.isfinite(scores).all()):
        raise GapExportError(
            f"pruner {pruning.pruner} gives no score for each token",
            seen=f"shape {list(scores.shape)}" if not fits else "values that are no numbers",
            allowed=f"finite numbers, [B, {wanted[1]}]",
        )


def _random_state(num_tokens: int) -> VisionState:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(_ROWS, *shape, generator=generator)

    return VisionState(
        patch_features=draw(num_tokens, _WIDTH),
        cls_features=draw(_WIDTH),
        cls_attention=draw(num_tokens).softmax(dim=-1),
        keys=draw(num_tokens, _WIDTH),
        next_attention=draw(num_tokens).softmax(dim=-1),
        next_keys=draw(num_tokens, _WIDTH),
        image_embeds=draw(num_tokens, _WIDTH),
        patch_embeds=draw(num_tokens, _WIDTH),
        text_embeds=draw(_WIDTH),
    )
