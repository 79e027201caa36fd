"""A look at what another package's pruner does, before a graph is made of it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gap_export.errors import GapExportError
from gap_export.pruning.pruner import (
    ChoosingPruner,
    FixedPruner,
    Pruner,
    Reading,
    ScoringPruner,
    VisionState,
)
from gap_export.spec.keep_indices import check_keep_indices
from gap_export.spec.manifest import GridSpec, PruningSpec

_ROWS, _WIDTH = 2, 8


def probe_pruner(pruner: Pruner, pruning: PruningSpec) -> None:
    """Let a pruner choose from random tokens, and check what it chooses.

    A graph cannot say no when it runs, so what it would do wrong is looked for here. It is shown
    what it reads and nothing else, as in the graph.

    Args:
        pruner: Not a fixed one, whose places are checked themselves.
        pruning: How many of how many.

    Raises:
        GapExportError: it does not choose K different tokens of 0..N-1, gives scores that are no
            numbers, merges into another shape, is not deterministic, or raises.
    """
    with torch.device("cpu"), torch.inference_mode():
        state = _random_state(pruning.num_visual_tokens, pruner.reads)
        chosen = _choose(pruner, state, pruning)
        for row in chosen.numpy():
            check_keep_indices(
                row,
                num_visual_tokens=pruning.num_visual_tokens,
                num_kept_tokens=pruning.num_kept_tokens,
                ascending=False,
                error=GapExportError,
                who=f"pruner {pruning.pruner}",
            )
        if not torch.equal(chosen, _choose(pruner, state, pruning)):
            raise GapExportError(
                f"pruner {pruning.pruner} is not deterministic",
                allowed="a choice that follows from what it reads",
                fix="draw places once, in a FixedPruner with uses_seed",
            )
    count = pruning.num_kept_tokens
    # As in a trace, where no value is there to decide by.
    state = _random_state(pruning.num_visual_tokens, pruner.reads, device="meta")
    blaming = _blaming(
        pruning.pruner,
        "traced, without values",
        fix="no value is known while a graph is made: torch.where in place of x[mask], and no "
        ".item(), nonzero or if on values",
    )
    with torch.inference_mode(), blaming:
        if isinstance(pruner, ChoosingPruner):
            pruner.choose(state, num_kept_tokens=count)
        elif isinstance(pruner, ScoringPruner):
            scores = pruner.scores(state)
            priorities = pruner.priorities(scores, num_kept_tokens=count)
            pruner.merge(state, scores, torch.topk(priorities, count, dim=1).indices)


def _choose(pruner: Pruner, state: VisionState, pruning: PruningSpec) -> torch.Tensor:
    """int64 [B, K], of a scoring pruner what its scores make of it."""
    name, count = pruning.pruner, pruning.num_kept_tokens
    if isinstance(pruner, ChoosingPruner):
        with _blaming(name):
            chosen = pruner.choose(state, num_kept_tokens=count)
        _check_tensor(name, "tokens", chosen, (_ROWS, count))
        if chosen.dtype != torch.int64:
            raise GapExportError(
                f"pruner {name} gives tokens of another type", seen=chosen.dtype, allowed="int64"
            )
        return chosen
    assert isinstance(pruner, ScoringPruner)
    with _blaming(name):
        scores = pruner.scores(state)
    _check_numbers(name, "scores", scores, (_ROWS, pruning.num_visual_tokens))
    with _blaming(name):
        priorities = pruner.priorities(scores, num_kept_tokens=count)
        chosen = torch.topk(priorities, count, dim=1, largest=False).indices
        merged = pruner.merge(state, scores, chosen)
    _check_numbers(name, "merged features", merged, (_ROWS, count, _WIDTH))
    if pruning.extra_token == "weighted":
        with _blaming(name):
            weights = pruner.weights(scores)
        _check_numbers(name, "weights", weights, (_ROWS, pruning.num_visual_tokens))
    return chosen


def fixed_places(pruner: FixedPruner, pruning: PruningSpec, grid: GridSpec) -> NDArray[np.int64]:
    """Where a fixed pruner keeps tokens, as it gives them; that they fit is not looked at.

    Args:
        pruner: It.
        pruning: How many of how many.
        grid: Of the visual tokens.

    Raises:
        GapExportError: it raises, or gives anything but an array of whole numbers.
    """
    with _blaming(pruning.pruner, "asked for its places"):
        places: object = pruner.places(
            grid, num_kept_tokens=pruning.num_kept_tokens, seed=pruning.seed
        )
    if isinstance(places, np.ndarray) and places.dtype.kind in "iu":
        return places.astype(np.int64)
    kind = f" of {places.dtype}" if isinstance(places, np.ndarray) else ""
    raise GapExportError(
        f"pruner {pruning.pruner} gives no places",
        seen=f"a {type(places).__name__}{kind}",
        allowed=f"a numpy array int64 [{pruning.num_kept_tokens}]",
    )


@contextmanager
def _blaming(
    name: str,
    when: str = "tried on random tokens",
    fix: str = "mend it; of the state only patch_features and what its reads names are given",
) -> Iterator[None]:
    """What another package's code raises is its own, and no bug of ours."""
    try:
        yield
    except Exception as err:
        torch_folder = Path(torch.__file__).parent
        frames = traceback.extract_tb(err.__traceback__)
        own = [at for at in frames if not Path(at.filename).is_relative_to(torch_folder)]
        said = (str(err).splitlines() or [""])[0]
        raise GapExportError(
            f"pruner {name} raises {type(err).__name__} when it is {when}",
            seen=f"{said} ({own[-1].filename}, line {own[-1].lineno})",
            fix=fix,
        ) from err


def _check_tensor(name: str, what: str, tensor: object, wanted: tuple[int, ...]) -> None:
    shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else None
    if shape != list(wanted):
        raise GapExportError(
            f"pruner {name} gives no {what} for each row and token",
            seen=f"a {type(tensor).__name__}" if shape is None else f"shape {shape}",
            allowed=f"a tensor [B, {', '.join(map(str, wanted[1:]))}]",
        )


def _check_numbers(name: str, what: str, tensor: object, wanted: tuple[int, ...]) -> None:
    _check_tensor(name, what, tensor, wanted)
    assert isinstance(tensor, torch.Tensor)
    if not bool(torch.isfinite(tensor).all()):
        raise GapExportError(
            f"pruner {name} gives {what} that are no numbers",
            seen="NaN or infinity",
            allowed="finite numbers, for any tokens",
        )


def _random_state(num_tokens: int, reads: frozenset[Reading], device: str = "cpu") -> VisionState:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(_ROWS, *shape, generator=generator).to(device)

    def show(reading: Reading, part: torch.Tensor) -> torch.Tensor | None:
        return part if reading in reads else None

    return VisionState(
        patch_features=draw(num_tokens, _WIDTH),
        cls_features=show("cls_features", draw(_WIDTH)),
        cls_attention=show("cls_attention", draw(num_tokens).softmax(dim=-1)),
        received_attention=show("received_attention", draw(num_tokens).softmax(dim=-1)),
        keys=show("keys", draw(num_tokens, _WIDTH)),
        next_attention=show("next_layer", draw(num_tokens).softmax(dim=-1)),
        next_keys=show("next_layer", draw(num_tokens, _WIDTH)),
        image_embeds=show("image_embeds", draw(num_tokens, _WIDTH)),
        patch_embeds=show("text", draw(num_tokens, _WIDTH)),
        text_embeds=show("text", draw(_WIDTH)),
        word_embeds=show("llm_text", draw(_WIDTH)),
        # In one row: the probe knows no grid.
        places=show(
            "places",
            torch.arange(num_tokens, device=device)[:, None] * torch.tensor([0, 1], device=device),
        ),
        rope_sums=show("rope_sums", draw(num_tokens, 2)[0]),
    )
