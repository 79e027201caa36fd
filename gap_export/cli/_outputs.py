"""What the files that a command writes must stay away from, by its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.outputs import OutputRule

if TYPE_CHECKING:
    from gap_export.manifest import Manifest

_FORCE_HELP = "Replace files that gap-export did not write; one that is read is never replaced."
ForceOption = Annotated[bool, typer.Option("--force", help=_FORCE_HELP)]
ForceGoldenOption = Annotated[
    bool, typer.Option("--force", help=f"{_FORCE_HELP} With --record: replace a golden.")
]


def output_rule(
    *,
    force: bool,
    inputs: Mapping[str, Sequence[str | Path]],
    outside: Mapping[str, Path],
) -> OutputRule:
    """The rule for the outputs of a command.

    Args:
        force: As given.
        inputs: Values of options that may name files or folders, also as ``ROLE=PATH`` or
            ``FOLDER:SPLIT``, by option; what is none is left out.
        outside: Bundles and goldens, by what they are.
    """
    found = {
        f"{option} {value}": Path(part)
        for option, values in inputs.items()
        for value in map(str, values)
        for part in (value, value.partition("=")[2], *_places_in(value))
        if part and _exists(part)
    }
    return OutputRule(inputs=found, outside=outside, force=force)


def with_sources(rule: OutputRule, manifest: Manifest) -> OutputRule:
    """The rule, and the checkpoint that a bundle was made from, which may be read as well."""
    sources = {
        f"the bundle's checkpoint {part.location}": Path(part.location)
        for part in manifest.source.parts
        if _exists(part.location)
    }
    return OutputRule(inputs={**rule.inputs, **sources}, outside=rule.outside, force=rule.force)


def _places_in(value: str) -> Sequence[str]:
    """Every part of a data set's name that could be its folder: NAME:ROOT:SPLIT, FOLDER:SPLIT."""
    words = value.split(":")
    return [
        str(Path(":".join(words[first:last])).expanduser())
        for first in range(len(words))
        for last in range(first + 1, len(words) + 1)
        if words[first]
    ]


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
