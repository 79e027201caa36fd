"""The exception tree: exit codes, one clear text, and the drawing of it kept true."""

from __future__ import annotations

import inspect

import pytest

from gap_export import errors
from gap_export.errors import BundleError, ExitCode, GapExportError, ParityError, UsageError

ALL_ERRORS = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, GapExportError)
]


def test_text_names_what_seen_allowed_and_fix_in_that_order() -> None:
    error = UsageError("keep out of range", seen=0, allowed="0 < keep <= 1", fix="use --keep 0.3")
    assert str(error) == "keep out of range: 0; allowed: 0 < keep <= 1; use --keep 0.3"


@pytest.mark.parametrize("seen", [0, False, ""])
def test_text_shows_a_falsy_value_seen(seen: object) -> None:
    assert str(UsageError("wrong", seen=seen)) == f"wrong: {seen}"


def test_text_is_only_what_where_nothing_else_is_known() -> None:
    assert str(BundleError("no bundle there")) == "no bundle there"


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_exit_code_follows_from_the_place_in_the_tree(kind: type[GapExportError]) -> None:
    expected = ExitCode.FAILED
    if issubclass(kind, UsageError):
        expected = ExitCode.USAGE
    if issubclass(kind, ParityError):
        expected = ExitCode.BELOW_BAR
    assert kind("x").exit_code == expected


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_drawing_of_the_tree_names_every_error(kind: type[GapExportError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
