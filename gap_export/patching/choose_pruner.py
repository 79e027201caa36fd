"""Which pruners can be put into a graph as it is, and the pass of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from gap_export.patching.options import DEFAULT_PRUNER, check_pruner
from gap_export.patching.prune_at_places import PruneAtPlaces
from gap_export.patching.prune_by_attention import PruneByAttention
from gap_export.patching.prune_by_cls import PruneByCls
from gap_export.patching.prune_features import PruneFeatures
from gap_export.spec.manifest import GridSpec, PruningSpec
from gap_export.spec.places import drawn_places, lattice_places
from gap_export.spec.positions import PositionMode, num_kept_tokens


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
_DRAWING = frozenset({"random"})


def settle_pruning(
    grid: GridSpec,
    *,
    pruner: str | None,
    keep_ratio: float,
    positions: PositionMode,
    seed: int,
) -> PruningSpec:
    """Check a request and settle its numbers.

    Args:
        grid: Of the visual tokens.
        pruner: Name; None for ``spatial``.
        keep_ratio: In (0, 1].
        positions: Which ids the kept tokens get.
        seed: Of the pruner that draws.

    Raises:
        UnsupportedPrunerError: a pruner that no pass puts into a foreign graph.
        UsageError: a keep ratio or a seed out of range.
    """
    name = DEFAULT_PRUNER if pruner is None else pruner
    check_pruner(name, seed)
    num_kept = num_kept_tokens(keep_ratio, grid.num_visual_tokens)
    return PruningSpec(
        pruner=name,
        order="raster",
        extra_token="none",
        positions=positions,
        keep_ratio=keep_ratio,
        seed=seed if name in _DRAWING else None,
        num_visual_tokens=grid.num_visual_tokens,
        num_kept_tokens=num_kept,
        num_emitted_tokens=num_kept,
        text_similarity_sign=None,
    )
