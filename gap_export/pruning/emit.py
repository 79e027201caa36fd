"""From who survives to what the decoder reads: order, merging, extra token, projection.

Shape letters: B rows, N visual tokens, K kept, K' emitted, D vision features, H the decoder's
hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gap_export.pruning.extra import CanvasGrid, add_up_dropped, place_extra
from gap_export.pruning.pruner import ScoringPruner, VisionState
from gap_export.pruning.select import gather_tokens, is_among, take_smallest
from gap_export.spec.manifest import GridSpec, PruningSpec

Project = Callable[[torch.Tensor], torch.Tensor]


def emit_scored(
    pruner: ScoringPruner,
    state: VisionState,
    scores: torch.Tensor,
    *,
    num_kept_tokens: int,
    pruning: PruningSpec,
    grid: GridSpec | CanvasGrid,
    project: Project,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best K, merged as the pruner has it; see :func:`emit_kept`.

    Args:
        pruner: Ranks and merges.
        state: What the pruner merges by; ``patch_features`` in any case.
        scores: float [B, N].
        num_kept_tokens: K; not ``pruning``'s where the number is adaptive.
        pruning: Order and extra token.
        grid: Of the N tokens.
        project: [..., D] to [..., H].
    """
    priorities = pruner.priorities(scores, num_kept_tokens=num_kept_tokens)
    keep = take_smallest(priorities, num_kept_tokens=num_kept_tokens, order=pruning.order)
    merged = pruner.merge(state, scores, keep)
    weights = pruner.weights(scores) if pruning.extra_token == "weighted" else None
    return emit_kept(
        state,
        keep,
        kept_features=merged,
        weights=weights,
        pruning=pruning,
        grid=grid,
        project=project,
    )


def emit_kept(
    state: VisionState,
    keep_indices: torch.Tensor,
    *,
    kept_features: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    pruning: PruningSpec,
    grid: GridSpec | CanvasGrid,
    project: Project,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Survivors and extra token as the decoder reads them.

    Nothing is projected that does not survive, unless the pruner had to see all of it projected.

    Args:
        state: ``patch_features``, and ``image_embeds`` if everything is projected already.
        keep_indices: int64 [B, K], in the order they are fed.
        kept_features: [B, K, D]; None for the patches as they are.
        weights: [B, N], of the extra token.
        pruning: Whether there is an extra token.
        grid: Of the N tokens.
        project: [..., D] to [..., H].

    Returns:
        image_features [B, K', H] and keep_indices int64 [B, K'], the extra token last.
    """
    if state.image_embeds is not None and kept_features is None:
        emitted = gather_tokens(state.image_embeds, keep_indices)
    else:
        if kept_features is None:
            kept_features = gather_tokens(state.patch_features, keep_indices)
        emitted = project(kept_features)
    if pruning.extra_token == "none":
        # A graph's output may not be a view of a constant.
        return emitted, keep_indices.clone()
    is_dropped = ~is_among(keep_indices, state.patch_features.shape[1])
    extra = project(add_up_dropped(state.patch_features, is_dropped, weights))
    place = place_extra(is_dropped, pruning.extra_position, grid)
    return torch.cat([emitted, extra], dim=1), torch.cat([keep_indices, place], dim=1)
