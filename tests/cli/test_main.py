"""From argv to exit code: the default command, errors, bugs, signals and broken pipes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gap_export import __version__, exporting
from gap_export.errors import ExportError, ParityError, UsageError
from gap_export.spec.requests import PruningRequest
from gap_export.stop_signals import Stopped, stop_signals
from tests.programs import run_program, start_program


@pytest.mark.parametrize(
    "argv",
    [
        ("refshapes-llava", "--keep", "0.3"),
        ("--keep", "0.3", "refshapes-llava"),
        ("-q", "refshapes-llava", "--keep", "0.3"),
        ("refshapes-llava", "--keep", "0.3", "-q"),
        ("export", "-q", "refshapes-llava", "--keep=0.3"),
    ],
)
def test_export_runs_where_no_command_is_named(run_cli, seen_options, argv):
    run_cli(*argv)
    assert seen_options == [
        exporting.ExportOptions(model="refshapes-llava", pruning=PruningRequest(keep_ratio=0.3))
    ]


@pytest.mark.parametrize(("error", "code"), [(UsageError, 2), (ExportError, 1), (ParityError, 3)])
def test_our_errors_are_one_message_and_their_exit_code(run_cli, monkeypatch, error, code):
    def fail(options, *, progress, warn):
        raise error("it broke", seen=7, fix="mend it")

    monkeypatch.setattr(exporting, "export_model", fail)
    outcome = run_cli("refshapes-llava", "-q")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err == "error: it broke: 7; mend it\n"


def test_a_bug_is_one_line_and_a_traceback_only_with_v(run_cli, monkeypatch):
    def fail(options, *, progress, warn):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(exporting, "export_model", fail)
    outcome = run_cli("refshapes-llava", "-q")
    assert outcome.code == 1
    assert outcome.err == (
        "error: ZeroDivisionError: oh\nthis is a bug; run with -v for the traceback\n"
    )
    for argv in (("-v", "refshapes-llava"), ("refshapes-llava", "-v")):
        outcome = run_cli(*argv)
        assert outcome.code == 1
        assert "Traceback (most recent call last)" in outcome.err


def test_version_and_help_go_to_stdout(run_cli):
    assert run_cli("--version").out == f"gap-export {__version__}\n"
    for flag in ("-h", "--help"):
        outcome = run_cli(flag)
        assert outcome.code == 0
        for command in ("export", "check", "ground", "eval", "inspect", "models", "doctor"):
            assert f"\n  {command} " in outcome.out


@pytest.mark.parametrize("command", ["export", "eval"])
def test_help_of_keep_has_the_defaults_of_both_budgets(run_cli, command):
    words = " ".join(run_cli(command, "--help").out.split())
    assert "[default: the recipe's; with an adaptive budget 1]" in words


def test_no_arguments_show_the_help(run_cli):
    outcome = run_cli()
    assert outcome.code == 2
    assert "Usage: gap-export" in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("signum", "code", "text"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_unwinds_open_contexts_and_is_one_line(
    run_cli, monkeypatch, tmp_path, signum, code, text
):
    cleaned = []

    def work(options, *, progress, warn):
        try:
            os.kill(os.getpid(), signum)
            time.sleep(5)
        finally:
            # A second signal must not cut the clean-up short.
            os.kill(os.getpid(), signum)
            cleaned.append(True)

    before = signal.getsignal(signum)
    monkeypatch.setattr(exporting, "export_model", work)
    outcome = run_cli("refshapes-llava", "-q")
    assert (outcome.code, outcome.err, cleaned) == (code, f"error: {text}\n", [True])
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(signum):
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with stop_signals():
            os.kill(os.getpid(), signum)
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_stopped_is_not_caught_as_an_ordinary_exception():
    assert not issubclass(Stopped, (Exception, KeyboardInterrupt))


def test_a_reader_that_leaves_is_no_error_message():
    # Far more than a pipe holds, so that the writer meets the closed end.
    code = (
        "import sys; from gap_export.cli import _main, models;"
        "models.format_table = lambda *a: 'x' * 1_000_000; sys.exit(_main.main(['models']))"
    )
    with start_program([sys.executable, "-c", code]) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(10) == 1


def test_python_m_runs_the_same_program():
    command = [sys.executable, "-m", "gap_export", "--version"]
    answer = run_program(command)
    assert answer.stdout == f"gap-export {__version__}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        (">/dev/full", 1, "no space left"),
        (">&-", 0, ""),
    ],
)
def test_a_stdout_that_takes_nothing_is_no_bug(redirection, code, words):
    command = f"{sys.executable} -m gap_export models {redirection}"
    done = run_program(["sh", "-c", command])
    assert done.returncode == code, done.stderr
    assert "bug" not in done.stderr
    assert words in done.stderr


def test_with_stderr_closed_messages_do_not_land_among_the_results():
    command = f"{sys.executable} -m gap_export no-such-model 2>&-"
    done = run_program(["sh", "-c", command])
    assert (done.returncode, done.stdout) == (2, "")


def test_characters_the_terminal_lacks_are_escaped():
    done = run_program(
        [sys.executable, "-m", "gap_export", "módel"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 2
    assert "m\\xf3del" in done.stderr
