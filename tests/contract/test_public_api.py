"""The public names and every command's flags, pinned in a text that a person can read.

After a change that is meant: ``python tests/contract/test_public_api.py`` writes the texts anew.
"""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any

import pytest

import gap_export
from gap_export.cli._app import build_command

API_FILE = Path(__file__).parent / "public_api.txt"
FLAGS_FILE = Path(__file__).parent / "cli_flags.txt"


def describe_api() -> str:
    """One line a public name: its signature, or its methods' signatures."""
    lines = []
    for name in sorted(gap_export.__all__):
        value = getattr(gap_export, name)
        if typing.get_origin(value) is not None:
            lines.append(f"{name} = {value}")
            continue
        if not inspect.isclass(value):
            lines.append(f"{name}{inspect.signature(value) if callable(value) else ''}")
            continue
        lines.append(f"class {name}{inspect.signature(value)}")
        for method, function in sorted(inspect.getmembers(value, inspect.isroutine)):
            if not method.startswith("_") and not hasattr(BaseException, method):
                lines.append(f"    {method}{inspect.signature(function)}")
    return "\n".join(lines) + "\n"


def describe_flags() -> str:
    """One block a command, one line an argument or option."""
    root = build_command()
    lines = ["gap-export", *map(describe_parameter, own_parameters(root))]
    for name, command in root.commands.items():
        lines += ["", name]
        lines += [describe_parameter(parameter) for parameter in own_parameters(command)]
    return "\n".join(lines) + "\n"


def own_parameters(command: Any) -> list[tuple[Any, Any]]:
    """A command's parameters with the types of its Python function."""
    hints = typing.get_type_hints(command.callback)
    return [(parameter, hints.get(parameter.name)) for parameter in command.params]


def describe_parameter(pair: tuple[Any, Any]) -> str:
    """``--positions gap|compact, default gap``."""
    parameter, hint = pair
    is_option = parameter.param_type_name == "option"
    names = " ".join(parameter.opts) if is_option else parameter.metavar
    value = "" if hint is bool or not is_option else f" {parameter.metavar or choices(hint)}"
    notes = []
    if not is_option and parameter.required:
        notes.append("required")
    if typing.get_origin(hint) is list or list in map(typing.get_origin, typing.get_args(hint)):
        notes.append("repeatable")
    if parameter.default is not None and hint is not bool:
        notes.append(f"default {parameter.default}")
    return "  " + ", ".join([f"{names}{value}", *notes])


def choices(hint: Any) -> str:
    """The values of a Literal, also inside an optional one."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(args)
    return "".join(choices(arg) for arg in args)


def test_help_names_no_option_that_the_command_has_not_got():
    for name, command in build_command().commands.items():
        known = {flag for parameter in command.params for flag in parameter.opts}
        helps = [command.help or "", *(p.help or "" for p in command.params if hasattr(p, "help"))]
        named = {flag for text in helps for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
        assert named <= known, name


def test_the_public_api_is_as_written_down():
    assert describe_api() == API_FILE.read_text()


def test_the_flags_are_as_written_down():
    assert describe_flags() == FLAGS_FILE.read_text()


def test_every_option_has_help_and_a_value_name():
    root = build_command()
    for command in [root, *root.commands.values()]:
        for parameter, hint in own_parameters(command):
            assert parameter.help, (command.name, parameter.name)
            assert parameter.metavar or hint is bool or choices(hint), parameter.name


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = gap_export.nonsense


if __name__ == "__main__":
    API_FILE.write_text(describe_api())
    FLAGS_FILE.write_text(describe_flags())
