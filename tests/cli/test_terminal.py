"""Streams, tables, sizes and progress."""

from __future__ import annotations

import io
import json
import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gap_export.cli import _progress
from gap_export.cli._progress import TerminalProgress
from gap_export.cli._terminal import Terminal, format_json, format_size, format_table
from gap_export.progress import SilentProgress


def test_numbers_stand_right_and_words_left():
    table = format_table(["pruner", "Acc"], [["cls", "9.5"], ["spatial", "93.0"], ["none", "-"]])
    assert table.splitlines() == [
        "pruner    Acc",
        "-------  ----",
        "cls       9.5",
        "spatial  93.0",
        "none        -",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_450_000, "1.4 MB"),
        (3 * 10**12, "3000.0 GB"),
    ],
)
def test_sizes_are_in_powers_of_ten(size, text):
    assert format_size(size) == text


def test_quiet_silences_all_but_errors(capsys):
    terminal = Terminal()
    terminal.quiet = True
    terminal.message("a")
    terminal.warning("b")
    terminal.error("c")
    terminal.result("d")
    assert capsys.readouterr() == ("d\n", "error: c\n")
    assert isinstance(terminal.progress(), SilentProgress)


def test_json_refuses_what_is_not_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        Terminal().json({"x": float("nan")})


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_readable_json_is_the_same_json(plain):
    assert json.loads(format_json(plain)) == plain


def test_a_list_of_plain_values_stays_on_one_line():
    text = format_json({"a": [1, 2], "b": [[1], []], "c": {}})
    assert text == '{\n  "a": [1, 2],\n  "b": [\n    [1],\n    []\n  ],\n  "c": {}\n}'


@pytest.mark.usefixtures("own_log")
def test_verbose_shows_the_log_of_the_package(capsys):
    Terminal().set_verbose()
    logging.getLogger("gap_export.somewhere").info("seen")
    assert capsys.readouterr().err == "gap_export.somewhere: seen\n"


def test_a_short_stage_leaves_nothing_behind_where_nobody_watches():
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream)).stage("working", total=2) as advance:
        advance(2)
    assert stream.getvalue() == ""


def test_a_long_stage_leaves_a_line(monkeypatch):
    monkeypatch.setattr(_progress, "LONG_S", 0.01)
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream)).stage("[exporting]"):
        time.sleep(0.02)
    assert stream.getvalue() == "[exporting]: 0.0 s\n"


def test_nested_stages_share_the_screen_and_count_their_own_steps():
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, force_terminal=True, width=100))
    with progress.stage("outer", total=3) as outer, progress.stage("inner", total=7) as inner:
        inner(5)
        outer(1)
        progress._bars.refresh()
        assert "1/3" in stream.getvalue()
        assert "5/7" in stream.getvalue()
    assert progress._bars is None


def test_a_stage_ends_its_bar_when_the_work_fails():
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, force_terminal=True))
    with pytest.raises(KeyError), progress.stage("working"):
        raise KeyError("x")
    assert progress._bars is None


def test_control_characters_in_an_error_are_spelt_out(capsys):
    Terminal().error("tensor \x1b[31mred\x1b[0m\nand é")
    assert capsys.readouterr().err == "error: tensor \\x1b[31mred\\x1b[0m\nand é\n"
