"""Which pruners can be put into a graph as it is, and the pass of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from gap_export.patching.options import DEFAULT_PRUNER, check_request
from gap_export.patching.prune_by_score import PruneByAttention, PruneByCls, PruneByScore
from gap_export.patching.prune_features import PruneAtPlaces, PruneFeatures
from gap_export.pruning.resolve import resolve_request
from gap_export.spec.manifest import GridSpec, PruningSpec
from gap_export.spec.places import drawn_places, lattice_places
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest

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
    total, kept = grid.num_visual_tokens, pruning.num_kept_tokens
    if pruning.pruner in SCORES:
        return SCORES[pruning.pruner](num_kept_tokens=kept, num_visual_tokens=total)
    if pruning.pruner == "spatial":
        places = lattice_places(grid, num_kept_tokens=kept)
    else:
        assert pruning.pruner == "random" and pruning.seed is not None
        # They are fed in raster order, in whichever order they were drawn.
        places = np.sort(drawn_places(total, num_kept_tokens=kept, seed=pruning.seed))
    return PruneAtPlaces(places, num_visual_tokens=total)
