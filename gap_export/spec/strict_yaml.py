"""YAML of a recipe, from wherever it comes: no aliases, no key given twice, no large file."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from gap_export.errors import RecipeError

# A recipe is a page of text; what is larger is something else.
_MAX_BYTES = 64 * 1024
_MAX_SHOWN = 300


def read_yaml(path: Path) -> Any:
    """What a file holds.

    Raises:
        RecipeError: unreadable, too large, or not such YAML.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise RecipeError(
                "recipe is too large",
                seen=f"{path}: more than {_MAX_BYTES} bytes",
                allowed=f"{_MAX_BYTES} bytes",
            )
        return copy.deepcopy(_parse(raw))
    except (
        *(OSError, yaml.YAMLError, RecursionError),
        # PyYAML lets these out where a value is not what its tag says, e.g. the date 2024-13-45.
        *(ValueError, LookupError, TypeError, AttributeError, OverflowError),
    ) as err:
        reason = f"{path}: {err}"[:_MAX_SHOWN]
        raise RecipeError("recipe cannot be read", seen=reason) from err


@lru_cache(maxsize=64)
def _parse(raw: bytes) -> Any:
    """A command asks for all recipes several times, and reading YAML is what takes the time."""
    return yaml.load(raw.decode("utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader


class _Loader(yaml.SafeLoader):
    """YAML without aliases and without keys given twice.

    A few aliases can stand for more data than memory holds; of two equal keys one would be dropped
    in silence.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping, refusing a key that is there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice"[:_MAX_SHOWN], key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Read one node, refusing a reference to another."""
        if self.check_event(yaml.AliasEvent):
            events: Any = self  # the stubs leave this method without types
            mark = events.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)
