"""One choice after another, as a loop that is part of the graph.

The loop is traced as a Scan. Unrolled, the same loop takes as long to run in ONNX Runtime, some ten
times as long to trace and to build in TensorRT for RTX, and its engine is several times as large.

Shape letters: B rows, N tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._higher_order_ops.scan import scan

from gap_export.pruning.select import first_of_largest

# Never larger than what is left to choose from.
_TAKEN = -torch.finfo(torch.float32).max


def choose_one_by_one(
    merits: torch.Tensor,
    state: torch.Tensor,
    update: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    *,
    num_choices: int,
) -> torch.Tensor:
    """Choose the token of most merit, let the others' merits follow from it, and again.

    Args:
        merits: float [B, N], finite; of equals the lower index is chosen.
        state: float [B, ...], what the update carries from one choice to the next.
        update: (merits, state, chosen int64 [B]) to new merits and state of the same shapes; what
            it says of tokens that were chosen does not matter.
        num_choices: K, 1..N.

    Returns:
        int64 [B, K], in the order of choice, without repeats.
    """
    index = torch.arange(merits.shape[1], device=merits.device)

    def step(
        carried: tuple[torch.Tensor, torch.Tensor], _: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        current, kept = carried
        chosen = first_of_largest(current)
        following, kept = update(current, kept, chosen)
        is_taken = (current == _TAKEN) | (index == chosen[:, None])
        return (torch.where(is_taken, _TAKEN, following), kept), chosen

    turns = torch.arange(num_choices, device=merits.device)
    chosen: torch.Tensor = scan(step, (merits, state), turns)[1]
    return chosen.transpose(0, 1)


def rows_at(matrices: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Row ``chosen[b]`` of each of ``matrices`` [B, N, M]: [B, M]."""
    rows, size, width = matrices.shape
    first = torch.arange(rows, device=matrices.device) * size
    return matrices.reshape(rows * size, width).index_select(0, first + chosen)
