"""Wherever a command prints text of others, it prints nothing but text, in lines of its own."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from gap_export.bundle.files import hash_line
from gap_export.cli._describe_check import describe_check
from gap_export.cli._progress import TerminalProgress
from gap_export.cli._terminal import Terminal
from gap_export.spec import recipe as recipes
from tests.report.made_up_checks import check_report

# Colours, a title, a link, a line that GitHub would run, one that passes for ours, turned text,
# a carriage return, what hides, a half character, and rich's own markup.
HOSTILE = (
    "x\x1b[31m\x1b]0;t\x07\x1b]8;;http://e\x1b\\\x9b2J\n::error::forged\nerror: forged\r"
    "\u202e\u2066\u200b\u2028\udc80[red]y"
)


def assert_harmless(text: str) -> None:
    assert "x\\x1b[31m" in text
    assert all(c.isprintable() or c in "\n\t" for c in text), ascii(text)
    assert not [line for line in text.splitlines() if line.startswith(("::", "error: forged"))]


def _strings(plain: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the strings of JSON data are."""
    inner = plain.items() if isinstance(plain, dict) else enumerate(plain)
    for key, value in inner:
        if isinstance(value, str):
            yield (*path, key)
        elif isinstance(value, (dict, list)):
            yield from _strings(value, (*path, key))


def _spoil(plain: Any, path: tuple[Any, ...]) -> Any:
    copy = json.loads(json.dumps(plain))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = HOSTILE
    return copy


def test_no_string_of_a_manifest_writes_to_the_terminal(run_cli, tiny_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    plain = json.loads((bundle / "gap.json").read_bytes())
    shown = 0
    # Of a list one is like the other.
    kinds = {tuple(p for p in path if isinstance(p, str)): path for path in _strings(plain)}
    for path in kinds.values():
        raw = json.dumps(_spoil(plain, path)).encode()
        (bundle / "gap.json").write_bytes(raw)
        (bundle / "gap.json.sha256").write_bytes(hash_line(raw))
        outcome = run_cli("inspect", bundle)
        assert outcome.code in (0, 2), (path, outcome.err)
        text = outcome.out + outcome.err
        if "x\\x1b" in text:
            shown += 1
            assert_harmless(text)
        else:
            assert "\x1b" not in text and "forged" not in text
        assert outcome.err.count("\n") <= 1
    assert shown > 20


def test_no_string_of_a_recipe_writes_to_the_terminal(run_cli, monkeypatch):
    listed = recipes.list_recipes()
    spoilt = [
        (replace_strings(recipe, ("name", "family", "summary", "license")), folder)
        for recipe, folder in listed
    ]
    monkeypatch.setattr(recipes, "list_recipes", lambda: spoilt)
    outcome = run_cli("models")
    assert outcome.code == 0
    assert_harmless(outcome.out)


def replace_strings(recipe: Any, names: tuple[str, ...]) -> Any:
    changes = dict.fromkeys(names, HOSTILE)
    if dataclasses.is_dataclass(recipe):
        return replace(recipe, **changes)
    return recipe.model_copy(update=changes)


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", HOSTILE],
        ["check", HOSTILE],
        ["ground", HOSTILE, HOSTILE, HOSTILE],
        ["eval", "demo", "--data", HOSTILE],
        ["eval", HOSTILE],
        ["export", HOSTILE],
        [HOSTILE],
        ["patch", HOSTILE],
        ["build", HOSTILE, "--target", "rtx"],
        ["inspect", "bundle", HOSTILE],
        ["inspect", "bundle", f"--{HOSTILE}"],
        ["check", "bundle", "--level", HOSTILE],
        ["export", "demo", "--positions", HOSTILE],
    ],
)
def test_no_argument_writes_to_the_terminal(run_cli, argv):
    outcome = run_cli(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert_harmless(outcome.err)


COMMANDS = ("::error::forged", "  ::add-mask::x", "##[error]forged", "x ##vso[task.x]y", "##a[x]")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_string_begins_a_command_of_a_job_runner(run_cli, tiny_bundle, tmp_path, command):
    """GitHub runs lines that begin with ``::``; it, Azure and TeamCity what ``##name[`` begins."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    plain = json.loads((bundle / "gap.json").read_bytes())
    plain["model"]["name"] = command
    raw = json.dumps(plain).encode()
    (bundle / "gap.json").write_bytes(raw)
    (bundle / "gap.json.sha256").write_bytes(hash_line(raw))
    shown = run_cli("inspect", bundle)
    as_json = run_cli("inspect", bundle, "--json")
    assert (shown.code, as_json.code) == (0, 0)
    assert json.loads(as_json.out)["manifest"]["model"]["name"] == command
    refused = run_cli("export", command)
    for text in (shown.out, as_json.out, shown.err, refused.err):
        assert not re.search(r"^\s*::|##\w*\[", text, re.MULTILINE), text


def test_no_string_of_a_check_writes_to_the_terminal():
    assert_harmless(describe_check(check_report(HOSTILE)))


def test_titles_of_stages_and_tracebacks_are_clean(capsys, monkeypatch):
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=400, color_system=None)
    monkeypatch.setattr("gap_export.cli._progress.LONG_S", -1)
    with TerminalProgress(console).stage(HOSTILE):
        pass
    assert "x\\x1b[31m" in stream.getvalue() and "\x1b[31m" not in stream.getvalue()
    assert "[red]y" in stream.getvalue()
    Terminal().trace(ValueError(HOSTILE))
    assert "\x1b" not in capsys.readouterr().err
