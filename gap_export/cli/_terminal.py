"""The two streams a command writes to: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gap_export.progress import Progress, SilentProgress
from gap_export.visible import VisibleFormatter, visible

# In strings of JSON alone; see gap_export.visible.
_COMMAND = re.compile(r"#(?=#\w*\[)")


class Terminal:
    """The two streams, and how talkative the user wants them.

    Attributes:
        quiet: Nothing on stderr but errors.
        verbose: Log messages of the package, and tracebacks of unexpected errors.
    """

    def __init__(self, *, started: float | None = None) -> None:
        """Start the clock.

        Args:
            started: When the command began, by ``time.monotonic()``; None: now.
        """
        self.quiet = False
        self.verbose = False
        self._started = time.monotonic() if started is None else started
        self._is_long = False

    def set_verbose(self) -> None:
        """Show the package's log on stderr."""
        self.verbose = True
        handler = logging.StreamHandler()
        handler.setFormatter(VisibleFormatter("%(name)s: %(message)s"))
        logger = logging.getLogger("gap_export")
        logger.handlers[:] = [handler]
        logger.setLevel(logging.DEBUG)

    def result(self, text: str) -> None:
        """Print the result of a command."""
        print(visible(text, lines=True))

    def json(self, plain: Any) -> None:
        """Print the result of a command as JSON; NaN and infinity are not JSON and refused."""
        print(_harmless(format_json(plain)))

    def json_line(self, plain: Any) -> None:
        """Print one of several results as a line of JSON, at once."""
        print(_harmless(json.dumps(plain, allow_nan=False)), flush=True)

    def begin(self, text: str) -> None:
        """Say what is being done, before the imports that take seconds; the first sign of life."""
        self._is_long = True
        self.message(f"{visible(text)} ...")

    def end(self) -> None:
        """Say how long the whole command took, where :meth:`begin` said that it may be long."""
        if self._is_long:
            self.message(f"took {time.monotonic() - self._started:.1f} s in all")

    def message(self, text: str) -> None:
        """Tell the user something that is not the result."""
        if not self.quiet:
            _print_error(text)

    def warning(self, text: str) -> None:
        """Tell the user that something may not be what they think."""
        self.message(f"warning: {visible(text)}")

    def trace(self, err: BaseException) -> None:
        """Show where an error came from."""
        _print_error("".join(traceback.format_exception(err)).rstrip("\n"))

    def error(self, text: str) -> None:
        """Say what went wrong, in quiet mode too."""
        _print_error(f"error: {text}")

    def progress(self) -> Progress:
        """A listener for long work: silent when quiet, else bars on stderr."""
        if self.quiet:
            return SilentProgress()
        from gap_export.cli._progress import TerminalProgress

        return TerminalProgress()


def process_started() -> float:
    """When this process began, by ``time.monotonic()``; now where the system does not tell.

    What a user waits for begins there, and not where our first line runs: starting Python is part
    of it.
    """
    age = 0.0
    try:
        # Behind the name, which may hold anything, in brackets: field 3 and those that follow.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        age = since_boot - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        pass
    return time.monotonic() - max(age, 0.0)


def _print_error(text: str) -> None:
    # Closed, it is None, which print would take for stdout, among the results.
    if sys.stderr is not None:
        print(visible(text, lines=True), file=sys.stderr)


def _harmless(text: str) -> str:
    """JSON without the one control that it lets pass in ASCII, and commands of job runners."""
    return _COMMAND.sub(r"\\u0023", text.replace("\x7f", "\\u007f"))


def format_json(plain: Any, indent: str = "") -> str:
    """JSON that people can read as well: a list of plain values stays on one line."""
    inner = indent + "  "
    if isinstance(plain, dict) and plain:
        items = [f"{json.dumps(str(k))}: {format_json(v, inner)}" for k, v in plain.items()]
        return f"{{\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}}}"
    if isinstance(plain, list) and any(isinstance(item, (dict, list)) for item in plain):
        items = [format_json(item, inner) for item in plain]
        return f"[\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}]"
    return json.dumps(plain, allow_nan=False)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align text in columns; numbers to the right.

    The result does not depend on the terminal's width, so that it is the same in a file.
    """
    header, *rows = [[visible(cell) for cell in row] for row in (header, *rows)]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell in {"", "-"} or cell[0].isdigit()


def format_size(size: int) -> str:
    """Bytes for people: ``1.4 MB``, in powers of ten."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
