"""One choice after another, as a loop that is part of the graph.

The loop is traced as a Scan. Unrolled, the same loop takes as long to run in ONNX Runtime, some ten
times as long to trace and to build in TensorRT for RTX, and its engine is several times as large.

Shape letters: B rows, N tokens, K choices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from gap_export.pruning.pruner import ChoosingPruner, VisionState
from gap_export.pruning.select import first_of_largest

if TYPE_CHECKING:
    import torch

Update: TypeAlias = (
    "Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]"
)

# Never larger than what is left to choose from.
_TAKEN = -float(np.finfo(np.float32).max)


class Choices(NamedTuple):
    """How tokens are chosen: the one of most merit, then, by what follows from it, the next.

    Attributes:
        merits: float [B, N], finite; of equals the lower index is chosen.
        state: float [B, ...], what the update carries from one choice to the next.
        update: (merits, state, chosen int64 [B]) to new merits and state of the same shapes; what
            it says of tokens that were chosen does not matter.
    """

    merits: torch.Tensor
    state: torch.Tensor
    update: Update


class GreedyPruner(ChoosingPruner):
    """Chooses the token of most merit, lets the others' merits follow from it, and again."""

    @abstractmethod
    def start(self, state: VisionState, *, num_kept_tokens: int) -> Choices:
        """What it chooses by, where K are to be chosen."""

    def choose(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor:
        """int64 [B, K]."""
        choices = self.start(state, num_kept_tokens=num_kept_tokens)
        return choose_one_by_one(choices, num_choices=num_kept_tokens)

    def margins(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor:
        """See ChoosingPruner; in units of the merits."""
        choices = self.start(state, num_kept_tokens=num_kept_tokens)
        return closest_margins(choices, num_choices=num_kept_tokens)


def choose_one_by_one(choices: Choices, *, num_choices: int) -> torch.Tensor:
    """Choose K tokens, as a loop that can be traced.

    Args:
        choices: By what.
        num_choices: K, 1..N.

    Returns:
        int64 [B, K], in the order of choice, without repeats.
    """
    import torch
    from torch._higher_order_ops.scan import scan

    index = torch.arange(choices.merits.shape[1], device=choices.merits.device)

    def step(
        carried: tuple[torch.Tensor, torch.Tensor], _: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        chosen = first_of_largest(carried[0])
        return _take(choices.update, carried, chosen, index), chosen

    turns = torch.arange(num_choices, device=choices.merits.device)
    chosen: torch.Tensor = scan(step, (choices.merits, choices.state), turns)[1]
    return chosen.transpose(0, 1)


def closest_margins(choices: Choices, *, num_choices: int) -> torch.Tensor:
    """How much more merit a chosen token had than the next best, at the closest of K choices.

    One choice leads to another: where two tokens are as good as each other but for rounding, all
    that is chosen afterwards hangs on it.

    Returns:
        float [B], 0 or more, in units of the merits.
    """
    import torch

    merits, state = choices.merits, choices.state
    closest = torch.full_like(merits[:, 0], torch.inf)
    index = torch.arange(merits.shape[1], device=merits.device)
    for _ in range(num_choices):
        chosen = first_of_largest(merits)
        others = torch.where(index == chosen[:, None], _TAKEN, merits)
        closest = torch.minimum(closest, merits.amax(dim=1) - others.amax(dim=1))
        merits, state = _take(choices.update, (merits, state), chosen, index)
    return closest


def _take(
    update: Update,
    carried: tuple[torch.Tensor, torch.Tensor],
    chosen: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merits and state behind a choice; ``index`` is 0..N-1."""
    import torch

    current, state = carried
    following, state = update(current, state, chosen)
    is_taken = (current == _TAKEN) | (index == chosen[:, None])
    return torch.where(is_taken, _TAKEN, following), state


def rows_at(matrices: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Row ``chosen[b]`` of each of ``matrices`` [B, N, M]: [B, M]."""
    import torch

    rows, size, width = matrices.shape
    first = torch.arange(rows, device=matrices.device) * size
    return matrices.reshape(rows * size, width).index_select(0, first + chosen)
