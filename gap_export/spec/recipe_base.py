"""Recipes that say only in what they differ from another: ``base: internvl3-1b``.

Entries of a mapping are replaced one by one, anything else as a whole. What a model is called,
under which license it is, where its weights come from and what was measured on it is never taken
over.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gap_export.errors import RecipeError
from gap_export.spec.strict_yaml import read_yaml

_OWN = frozenset({"name", "aliases", "summary", "license", "checkpoint", "published"})


def with_base(plain: Any, path: Path, shipped: Mapping[str, Path]) -> Any:
    """What a recipe says and, where it is silent, what its base says.

    Args:
        plain: What its file holds.
        path: The file, for messages.
        shipped: The files of this package's recipes by name; a base is one of them.

    Raises:
        RecipeError: the base is none of them, or has a base itself.
    """
    if not isinstance(plain, dict) or "base" not in plain:
        return plain
    own = {key: value for key, value in plain.items() if key != "base"}
    name = plain["base"]
    base = read_yaml(shipped[name]) if isinstance(name, str) and name in shipped else None
    if not isinstance(base, dict) or "base" in base:
        usable = [one for one, home in sorted(shipped.items()) if "base" not in read_yaml(home)]
        raise RecipeError(
            f"recipe {path}: base cannot be used",
            seen=reprlib.repr(name),
            allowed=f"the name of a recipe that has no base itself: {', '.join(usable)}",
        )
    return _joined({key: value for key, value in base.items() if key not in _OWN}, own)


def _joined(base: dict[Any, Any], own: dict[Any, Any]) -> dict[Any, Any]:
    """``own`` put over ``base``."""
    both = {
        key: _joined(base[key], value)
        for key, value in own.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **own, **both}
