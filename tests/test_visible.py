"""Text of others is shown, and moves, hides and forges nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.errors import BundleError
from gap_export.visible import visible, visible_strings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("the small red circle", "the small red circle"),
        ("größer, 赤い丸, 😀, a\u3000b, a\u00a0b", "größer, 赤い丸, 😀, a\u3000b, a\u00a0b"),
        ("e\u0301", "e\u0301"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "\\x1b]8;;http://x\\x1b\\link\\x1b]8;;\\x07"),
        ("\x9b31m \x90 \x7f", "\\x9b31m \\x90 \\x7f"),
        ("good\rbad\b", "good\\rbad\\x08"),
        ("a\n::error::b\tc", "a\\n::error::b\\tc"),
        ("a\x0b\x0c\x85\u2028\u2029b", "a\\x0b\\x0c\\x85\\u2028\\u2029b"),
        ("\u202a\u202e\u2066\u2069\u200e\u061c", "\\u202a\\u202e\\u2066\\u2069\\u200e\\u061c"),
        ("a\u200b\u200d\u2060\ufeff\u00adb", "a\\u200b\\u200d\\u2060\\ufeff\\xadb"),
        ("\U000e0041\ufff9\uffff", "\\U000e0041\\ufff9\\uffff"),
        ("\u3164\u2800", "\\u3164\\u2800"),
        ("\udc80\ud800", "\\udc80\\ud800"),
    ],
)
def test_what_is_not_seen_is_spelt_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(st.characters()))
def test_what_is_shown_is_one_line_that_can_be_encoded_and_stays(text: str) -> None:
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    assert shown.encode("utf-8").decode() == shown
    assert visible(shown) == shown
    assert visible(text, lines=True).count("\n") == text.count("\n")


def test_an_error_is_one_line_whatever_it_tells_of() -> None:
    err = BundleError("a \x1b[2Jb", seen="c\nerror: d\r", allowed="\u202ee", fix="f\x07")
    assert str(err) == "a \\x1b[2Jb: c\\nerror: d\\r; allowed: \\u202ee; f\\x07"
    assert err.seen == "c\nerror: d\r"


@dataclass(frozen=True, kw_only=True)
class _Held:
    name: str
    parts: tuple[str, ...]
    by_name: dict[str, list[str | int | None]]


def test_all_strings_of_some_data_are_cleaned() -> None:
    found = visible_strings(_Held(name="\x1b", parts=("a\n",), by_name={"\r": ["\x07", 1, None]}))
    assert found == _Held(name="\\x1b", parts=("a\\n",), by_name={"\\r": ["\\x07", 1, None]})
