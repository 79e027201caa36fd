"""The one place that cleans text of others before it is shown.

Names, strings of manifests and recipes, expressions, answers and messages of other programs may
hold a terminal's escapes, marks that turn text around or hide it, and line ends that pass for lines
of ours, which GitHub Actions even runs as commands where they begin with ``::``.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

_Value = TypeVar("_Value")

_MAX_LINE = 2_000
# Letters by Unicode that show nothing: Hangul fillers and the empty Braille pattern.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")
# What job runners take for commands: of GitHub Actions at the beginning of a line; of it, Azure and
# TeamCity anywhere in one.
_COMMAND = re.compile(r"^(\s*):(?=:)|#(?=#\w*\[)", re.MULTILINE)


def visible(text: str, *, lines: bool = False) -> str:
    r"""Text in which escapes such as ``\x1b`` stand for what cannot be seen or moves the rest.

    Args:
        text: Of others, or ours with theirs in it.
        lines: Leave line feeds and tabs, for text that was put together of clean lines.
    """
    if not (text.isascii() and text.isprintable()):
        kept = "\n\t" if lines else ""
        text = "".join(c if c in kept or _is_seen(c) else ascii(c)[1:-1] for c in text)
    return _COMMAND.sub(_escaped, text)


class VisibleFormatter(logging.Formatter):
    """Formats records of a log in which text of others is clean; their lines stay lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, as text."""
        return visible(super().format(record), lines=True)


def visible_strings(value: _Value, *, show: Callable[[str], str] = visible) -> _Value:
    """The same data, each string in it as :func:`visible` shows it.

    Args:
        value: Strings, or what holds them: dataclasses, mappings, lists and tuples.
        show: Shows a string in its place, such as :func:`clean`.
    """

    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return show(value)
        if is_dataclass(value) and not isinstance(value, type):
            named = [one.name for one in fields(value) if one.init]
            return replace(value, **{name: shown(getattr(value, name)) for name in named})
        if isinstance(value, Mapping):
            return {shown(key): shown(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(shown, value))
        return value

    return shown(value)  # type: ignore[no-any-return]


def _escaped(found: re.Match[str]) -> str:
    return f"{found[0][:-1]}\\x{ord(found[0][-1]):02x}"


def _is_seen(character: str) -> bool:
    # To Python a space that is not ASCII's is nothing to be printed.
    shown = character.isprintable() or unicodedata.category(character) == "Zs"
    return shown and character not in _BLANK


def clean(text: str) -> str:
    """Text in one line in which escapes stand for what cannot be seen; not without end."""
    shown = visible(text)
    return shown if len(shown) <= _MAX_LINE else f"{shown[:_MAX_LINE]}..."
