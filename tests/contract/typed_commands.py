"""Command lines in documentation and CI jobs."""

from __future__ import annotations

import shlex

from gap_export.cli._app import DEFAULT_COMMAND, build_command


def unknown_flags(line: str) -> set[str]:
    """Flags of a ``gap-export`` line that its command has not got."""
    _, *words = shlex.split(line, comments=True)
    commands = build_command().commands
    name = words.pop(0) if words[0] in commands else DEFAULT_COMMAND
    known = {flag for parameter in commands[name].params for flag in parameter.opts}
    return {word for word in words if word.startswith("-")} - known
