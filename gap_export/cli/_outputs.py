"""What the files that a command writes must stay away from, by its options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gap_export.outputs import OutputRule

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
        # Several parts of one value may exist.
        f"{option} {value}" + (f" ({part})" if part != value else ""): Path(part).expanduser()
        for option, values in inputs.items()
        for value in map(str, values)
        for part in (value, value.partition("=")[2], *_places_in(value))
        if part and _exists(part)
    }
    return OutputRule(inputs=found, outside=outside, force=force)


def with_sources(rule: OutputRule, places: Iterable[str | Path]) -> OutputRule:
    """The rule, and what is read of a model besides: its checkpoint, and what gap-export brings.

    Args:
        rule: Of what the options name.
        places: Of the checkpoint's parts, as far as they are known.
    """
    from gap_export.spec.recipe import models_dir

    sources = {f"the checkpoint {place}": Path(place) for place in places if _exists(str(place))}
    own = {"the models of gap-export": models_dir()}
    return replace(rule, inputs={**rule.inputs, **sources, **own})


def _places_in(value: str) -> Sequence[str]:
    """Every part of a data set's name that could be its folder: NAME:ROOT:SPLIT, FOLDER:SPLIT."""
    words = value.split(":")
    return [
        ":".join(words[first:last])
        for first in range(len(words))
        for last in range(first + 1, len(words) + 1)
        if words[first]
    ]


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
