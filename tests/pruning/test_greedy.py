"""Choices one by one: how close the closest of them was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gap_export.pruning import find_pruner
from gap_export.pruning.cdpruner import CdPruner
from gap_export.pruning.divprune import DivPrunePruner
from gap_export.pruning.pruner import VisionState
from gap_export.spec.manifest import GridSpec
from gap_export.spec.places import token_places

N = 12


def make_state(seed: int) -> VisionState:
    rng = np.random.default_rng(seed)
    return VisionState(
        patch_features=torch.zeros(2, N, 1),
        image_embeds=torch.from_numpy(rng.normal(size=(2, N, 6))),
        patch_embeds=torch.from_numpy(rng.normal(size=(2, N, 4))),
        text_embeds=torch.from_numpy(rng.normal(size=(2, 4))),
        received_attention=torch.from_numpy(rng.dirichlet(np.ones(N), size=2)),
        cls_attention=torch.from_numpy(rng.dirichlet(np.ones(N), size=2)),
        keys=torch.from_numpy(rng.normal(size=(2, N, 4))),
        places=torch.from_numpy(token_places(GridSpec(rows=3, cols=4))),
        rope_sums=torch.from_numpy(rng.normal(size=(N, 2))),
    )


def slow_divprune_margin(embeds: np.ndarray, count: int) -> float:
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    merits = np.where(np.eye(N, dtype=bool), 9.0, distance).min(axis=1)
    chosen: list[int] = []
    margins = []
    while len(chosen) < count:
        left = [i for i in range(N) if i not in chosen]
        best, *others = sorted((merits[i] for i in left), reverse=True)
        margins.append(best - others[0] if others else np.inf)
        chosen.append(next(i for i in left if merits[i] == best))
        merits = distance[:, chosen].min(axis=1)
    return min(margins)


@pytest.mark.parametrize("count", [1, 5, N - 1])
def test_margins_equal_the_slow_ones(count):
    state = make_state(0)
    found = DivPrunePruner().margins(state, num_kept_tokens=count)
    assert found.shape == (2,)
    for row in range(2):
        slow = slow_divprune_margin(state.image_embeds[row].numpy(), count)
        # Each other's nearest neighbours tie at the first choice.
        assert float(found[row]) == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "d2pruner", "nuwa", "ivc-extent"])
def test_what_is_further_than_the_margin_does_not_change_the_choice(name):
    """And what is nearer may: a margin that is too large would excuse nothing it should."""
    changed, pruner = 0, find_pruner(name)
    for seed in range(40):
        state = make_state(seed)
        margins = pruner.margins(state, num_kept_tokens=5)
        chosen = pruner.choose(state, num_kept_tokens=5)
        for size in (1e-9, 1e-1):
            noise = torch.from_numpy(np.random.default_rng(1).normal(size=(2, N, 6))) * size
            # Attention is divided by its mean, a twelfth.
            less = noise[:, :, 0].abs() / 100
            other = replace(
                state,
                image_embeds=state.image_embeds + noise,
                cls_attention=state.cls_attention + less,
                received_attention=state.received_attention + less,
            )
            found = pruner.choose(other, num_kept_tokens=5)
            same = (found.sort(dim=1).values == chosen.sort(dim=1).values).all(dim=1)
            assert same[margins > 100 * size].all()
            changed += int((~same).sum()) if size > 1e-2 else 0
    assert changed > 0


def test_tokens_that_are_alike_leave_no_margin():
    state = make_state(3)
    embeds = state.image_embeds
    embeds[:, 7] = embeds[:, 2]
    far = -embeds.mean(dim=1)
    embeds[:, 2] = embeds[:, 7] = 5 * far
    assert (CdPruner().margins(state, num_kept_tokens=N) >= 0).all()
    # One of the two is chosen at some time, when the other is as good.
    assert (DivPrunePruner().margins(state, num_kept_tokens=N)[:] <= 1e-12).all()
