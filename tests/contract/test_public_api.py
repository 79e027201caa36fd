"""The public names and every command's flags, pinned in a text that a person can read.

After a change that is meant: ``python tests/contract/test_public_api.py`` writes the texts anew.
"""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gap_export
from gap_export import exporting
from gap_export.bundle import open_bundle
from gap_export.cli._app import build_command
from gap_export.evaluation import evaluate as evaluation
from gap_export.exporting import ExportOptions, ExportReport
from gap_export.spec.requests import options_of

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


# What a parameter is called as a flag, where that is not its name with dashes.
_FLAGS = {
    "check": {"backends": "backend", "levels": "level", "images": "image", "required": "require"},
    "build": {"targets": "target"},
    "ground": {
        "execution_providers": "provider", "num_threads": "threads", "image": "source",
        "expression": "expressions",
    },
}  # fmt: skip
# How things are shown, and where: a caller of a function has its result.
_SHOWN = {
    "json", "quiet", "verbose", "report-json", "junit", "markdown", "html", "save", "progress",
    "warn", "force", "min-recovered", "rule",
}  # fmt: skip
# Only a program has them: arrays in place of files, a session that stays open, a bundle's
# unpruned baseline in other positions, and what commands read of the environment.
_ARRAYS = {
    "frame", "color", "cuda-graphs", "positions", "expressions", "kept-bytes", "kept-graph-bytes",
}  # fmt: skip
# A program's loop over frames; in Python it is the caller's.
_FRAMES = {"every", "newest", "same-frame"}


def _offered(*functions: Callable[..., Any]) -> set[str]:
    """The options of public functions, those of the requests they take among them."""
    found = set()
    for function in functions:
        hints = typing.get_type_hints(function)
        for name in inspect.signature(function).parameters:
            request = hints.get(name)
            if dataclasses.is_dataclass(request) and request.__module__.endswith("requests"):
                found |= {each.flag.removeprefix("--") for each in options_of(request)}
            elif name != "self":
                found.add(name)
    return found


@pytest.mark.parametrize(
    ("command", "functions", "apart"),
    [
        ("export", ["export"], set()),
        # Other choices of a pruning are refused by patch.
        (
            "patch", ["patch"],
            {
                "order", "extra-token", "extra-position", "budget", "pruner-text", "attention",
                "canvas",
            },
        ),
        ("build", ["build"], set()),
        # The flag makes one command of the two functions.
        ("check", ["check", "record"], {"record", "folder"}),
        # Flags of one pruning, and what is made of all: prunings.
        (
            "eval", ["evaluate"],
            {*(each.flag[2:] for each in options_of(gap_export.PruningRequest)), "prunings",
             "block-size", "quantizer", "quantize-lm-head"},
        ),
        ("ground", ["GroundingSession.open", "GroundingSession.ground"], _ARRAYS | _FRAMES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_function_offers_what_its_command_offers(
    command: str, functions: list[str], apart: set[str]
) -> None:
    named = []
    for name in functions:
        function: Any = gap_export
        for part in name.split("."):
            function = getattr(function, part)
        named.append(function)
    names = _FLAGS.get(command, {})
    offered = {names.get(each, each).replace("_", "-") for each in _offered(*named)}
    flags = {
        parameter.opts[0].removeprefix("--").replace("_", "-")
        for parameter in build_command().commands[command].params
    }
    assert offered - _SHOWN - apart == flags - _SHOWN - apart


def test_examples_of_the_public_api_run(
    demo_bundle: Path, demo_whole_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def made(bundle: Path, options: ExportOptions) -> ExportReport:
        """What this very export gave other tests."""
        shutil.copytree(bundle, options.out)
        manifest = open_bundle(options.out).manifest
        return ExportReport(bundle=options.out, manifest=manifest, seconds={})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exporting, "export_model", lambda options, **_: made(demo_bundle, options))
    monkeypatch.setattr(
        evaluation,
        "export_checkpoint",
        lambda recipe, checkpoint, options, **_: made(demo_whole_bundle, options),
    )
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in (
        "PruningRequest", "WeightsRequest", "EnginesRequest", "export", "GroundingSession", "check",
        "record", "evaluate", "patch", "build", "GapExportError",
    ):  # fmt: skip
        found = finder.find(getattr(gap_export, name), name, globs={})
        assert found and found[0].examples, name
        printed: list[str] = []
        assert runner.run(found[0], out=printed.append).failed == 0, "".join(printed)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = gap_export.nonsense


if __name__ == "__main__":
    API_FILE.write_text(describe_api())
    FLAGS_FILE.write_text(describe_flags())
