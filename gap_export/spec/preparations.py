"""The ways to prepare an image, by the names that recipes and manifests use.

How each works is code of the runtime; here is only where it lies, since reading a bundle or
building its engines needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gap_export.spec.family import other_families

_OURS = "gap_export.runtime.images.preparations"
DYNAMIC_TILES = "dynamic_tiles"
SHARED: Mapping[str, str] = MappingProxyType(
    {
        "pad": f"{_OURS}:PAD",
        "squash": f"{_OURS}:SQUASH",
        "anyres": f"{_OURS}:ANYRES",
        DYNAMIC_TILES: f"{_OURS}:DYNAMIC_TILES",
    }
)
# Those that end each row of tokens, joined from several tiles, with the model's newline vector.
WITH_NEWLINE = frozenset({"anyres"})
# Those that cut an image into the manifest's tiles.
TILED = WITH_NEWLINE | {DYNAMIC_TILES}


def known_preparations() -> Mapping[str, str]:
    """``module:NAME`` of each by its name: those that families share, then families' own."""
    own = {name: place for one in other_families() for name, place in one.preparations.items()}
    return {**own, **SHARED}
