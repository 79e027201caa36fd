"""Which pruners can be put into a graph as it is, and the pass of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gap_export.patching.options import DEFAULT_PRUNER, check_request
from gap_export.patching.prune_by_score import PruneByAttention, PruneByCls, PruneByScore
from gap_export.patching.prune_features import PruneAtPlaces, PruneFeatures
from gap_export.pruning.resolve import resolve_request
from gap_export.spec.manifest import GridSpec, PruningSpec
from gap_export.spec.places import drawn_places, lattice_places
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest


def _lattice(grid: GridSpec, pruning: PruningSpec) -> NDArray[np.int64]:
    return lattice_places(grid, num_kept_tokens=pruning.num_kept_tokens)


def _drawn(grid: GridSpec, pruning: PruningSpec) -> NDArray[np.int64]:
    """Fed in raster order, in whichever order they were drawn."""
    assert pruning.seed is not None
    kept = pruning.num_kept_tokens
    return np.sort(drawn_places(grid.num_visual_tokens, num_kept_tokens=kept, seed=pruning.seed))


PLACES: Mapping[str, Callable[[GridSpec, PruningSpec], NDArray[np.int64]]] = MappingProxyType(
    {"spatial": _lattice, "random": _drawn}
)
SCORES: Mapping[str, type[PruneByScore]] = MappingProxyType(
    {"cls": PruneByCls, "fastervlm": PruneByAttention}
)


def settle_pruning(recipe: Recipe, request: PruningRequest) -> PruningSpec:
    """Check a request and settle its numbers.

    Raises:
        UnsupportedPrunerError: a pruner that no pass puts into a foreign graph.
        UsageError: a keep ratio or a seed out of range.
    """
    check_request(request)
    if request.pruner is None:
        request = replace(request, pruner=DEFAULT_PRUNER)
    # Whether the graph has a CLS token, its pass finds out.
    return resolve_request(recipe, request, ("cls_features", "cls_attention"))


def pruning_pass(grid: GridSpec, pruning: PruningSpec) -> PruneFeatures:
    """The pass of a pruner that :func:`settle_pruning` let through."""
    total = grid.num_visual_tokens
    if pruning.pruner in PLACES:
        return PruneAtPlaces(PLACES[pruning.pruner](grid, pruning), num_visual_tokens=total)
    return SCORES[pruning.pruner](num_kept_tokens=pruning.num_kept_tokens, num_visual_tokens=total)
