"""From argv to an exit code: the one place where errors, signals and broken pipes end."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gap_export.cli._app import build_command
from gap_export.cli._terminal import Terminal, process_started
from gap_export.errors import ExitCode, GapExportError
from gap_export.stop_signals import Stopped, stop_signals
from gap_export.visible import visible

PROGRAM = "gap-export"


def main(
    argv: Sequence[str] | None = None,
    *,
    command: Callable[[], Any] = build_command,
    program: str = PROGRAM,
) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None for those of this process.
        command: Makes the command, or the tree of them, that reads the arguments.
        program: What usage messages call it.

    Returns:
        The exit code, see :class:`gap_export.errors.ExitCode`; 128 + n after signal n.
    """
    _prepare_streams()
    # A list of arguments may come from a process that did other things before.
    terminal = Terminal(started=process_started() if argv is None else None)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with stop_signals():
            code = _run(command(), arguments, terminal, program)
        terminal.end()
        if sys.stdout is not None:
            sys.stdout.flush()
    except GapExportError as err:
        if err.exit_code != ExitCode.USAGE:
            terminal.end()
        terminal.error(str(err))
        code = int(err.exit_code)
    except Stopped as stop:
        terminal.error(stop.text)
        code = stop.exit_code
    except BrokenPipeError:
        # The reader left (`| head`): no message, and none from the interpreter's last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = int(ExitCode.FAILED)
    except OSError as err:
        if err.errno != errno.ENOSPC or err.filename is not None:
            code = _report_bug(err, terminal)
        else:
            # Without a file name it is a stream: the result went to a full device.
            terminal.error("the result cannot be written: no space left")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = int(ExitCode.FAILED)
    except Exception as err:  # noqa: BLE001 - users see a line, not a traceback; -v shows it all
        code = _report_bug(err, terminal)
    return code


def _prepare_streams() -> None:
    """A character that the terminal's encoding lacks is escaped instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report_bug(err: Exception, terminal: Terminal) -> int:
    if terminal.verbose:
        terminal.trace(err)
    hint = "" if terminal.verbose else "; run with -v for the traceback"
    terminal.error(f"{type(err).__name__}: {visible(str(err))}\nthis is a bug{hint}")
    return int(ExitCode.FAILED)


def _run(command: Any, arguments: list[str], terminal: Terminal, program: str) -> int:
    """Hand over to typer, which ends every command, and every usage error, with SystemExit."""
    try:
        command.main(args=arguments, prog_name=program, obj=terminal)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(ExitCode.OK)
    return int(ExitCode.OK)
