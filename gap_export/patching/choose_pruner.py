"""Which pruners can be put into a graph as it is, and the pass of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from gap_export.patching.options import DEFAULT_PRUNER, check_request
from gap_export.patching.prune_at_places import PruneAtPlaces
from gap_export.patching.prune_by_attention import PruneByAttention
from gap_export.patching.prune_by_cls import PruneByCls
from gap_export.patching.prune_features import PruneFeatures
from gap_export.pruning.resolve import resolve_request
from gap_export.spec.manifest import GridSpec, PruningSpec
from gap_export.spec.places import drawn_places, lattice_places
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest


def _spatial(grid: GridSpec, pruning: PruningSpec) -> PruneFeatures:
    places = lattice_places(grid, num_kept_tokens=pruning.num_kept_tokens)
    return PruneAtPlaces(places, num_visual_tokens=pruning.num_visual_tokens)


def _random(grid: GridSpec, pruning: PruningSpec) -> PruneFeatures:
    assert pruning.seed is not None
    places = drawn_places(
        grid.num_visual_tokens, num_kept_tokens=pruning.num_kept_tokens, seed=pruning.seed
    )
    # Fed in raster order, whatever the order drawn.
    places.sort()
    return PruneAtPlaces(places, num_visual_tokens=pruning.num_visual_tokens)


def _cls(grid: GridSpec, pruning: PruningSpec) -> PruneFeatures:
    return PruneByCls(
        num_kept_tokens=pruning.num_kept_tokens, num_visual_tokens=grid.num_visual_tokens
    )


def _fastervlm(grid: GridSpec, pruning: PruningSpec) -> PruneFeatures:
    return PruneByAttention(
        num_kept_tokens=pruning.num_kept_tokens, num_visual_tokens=grid.num_visual_tokens
    )


PASSES: Mapping[str, Callable[[GridSpec, PruningSpec], PruneFeatures]] = MappingProxyType(
    {"spatial": _spatial, "random": _random, "cls": _cls, "fastervlm": _fastervlm}
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
