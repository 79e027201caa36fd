"""``python -m gap_export.engines build BUNDLE --target orin``: on a device that has nothing else.

Standard library, numpy and a TensorRT package alone; ``gap-export build`` does the same where the
whole package is installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from gap_export.engines.command import describe_folders, run_build
from gap_export.engines.targets import TARGETS
from gap_export.errors import ExitCode, GapExportError
from gap_export.progress import Advance, Progress, SilentProgress
from gap_export.spec.requests import BuildOptions, LimitsRequest, options_of
from gap_export.stop_signals import Stopped, stop_signals
from gap_export.visible import VisibleFormatter, visible

_PROGRAM = "python -m gap_export.engines"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


class LineProgress:
    """Implements :class:`gap_export.progress.Progress` on stderr: percents on a terminal."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Show how far a stage is; one line remains."""
        live, done, started = sys.stderr.isatty(), 0, time.monotonic()
        title = visible(title)

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            if live and total:
                _say(f"\r{title}: {100 * done // total} %", end="")

        yield advance
        back = "\r" if live else ""
        _say(f"{back}{title}: {time.monotonic() - started:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None for those of this process.

    Returns:
        The exit code, see :class:`gap_export.errors.ExitCode`; 128 + n after signal n.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(ExitCode.USAGE)
    if options.verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(VisibleFormatter("%(name)s: %(message)s"))
        logging.basicConfig(level=logging.DEBUG, handlers=[handler])
    try:
        with stop_signals():
            _build(options)
    except GapExportError as err:
        _say(f"error: {err}")
        return int(err.exit_code)
    except Stopped as stop:
        _say(f"error: {stop.text}")
        return stop.exit_code
    return int(ExitCode.OK)


def _build(options: argparse.Namespace) -> None:
    progress: Progress = SilentProgress() if options.quiet else LineProgress()
    folders = run_build(
        options.bundle,
        options.target,
        only=options.only or (),
        overrides=LimitsRequest(**_values_of(LimitsRequest, options)),
        options=BuildOptions(**_values_of(BuildOptions, options)),
        progress=progress,
        warn=lambda text: None if options.quiet else _say(f"warning: {visible(text)}"),
    )
    for row in describe_folders(folders):
        size, seconds = row["size_bytes"] / 1e6, row["build_seconds"]
        sys.stdout.write(f"{visible(row['file'])}  {size:.1f} MB  {seconds:.1f} s\n")


def _say(text: str, end: str = "\n") -> None:
    sys.stderr.write(f"{text}{end}")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM, description="TensorRT engines from a bundle, on the device they are for."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    build: Any = commands.add_parser("build", help="build engines into a bundle")
    build.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder of a bundle")
    build.add_argument(
        "--target",
        metavar="TARGET",
        action="append",
        required=True,
        help=f"{', '.join(TARGETS)}; rtx:sm89 names a GPU generation; repeatable",
    )
    build.add_argument(
        "--only", metavar="COMPONENT", action="append", help="build this one alone; repeatable"
    )
    for each in (*options_of(LimitsRequest), *options_of(BuildOptions)):
        help_text, lowest, highest = each.option.help, each.option.min, each.option.max
        how: dict[str, Any] = {"metavar": each.option.metavar, "type": _whole(lowest, highest)}
        if get_origin(each.type) is Literal:
            how = {"choices": get_args(each.type)}
        build.add_argument(each.flag, dest=each.name, default=each.default, help=help_text, **how)
    build.add_argument("-q", "--quiet", action="store_true", help="nothing but errors on stderr")
    build.add_argument("-v", "--verbose", action="store_true", help="TensorRT's own messages")
    return parser


def _values_of(request: type[Any], given: argparse.Namespace) -> dict[str, Any]:
    return {each.name: getattr(given, each.name) for each in options_of(request)}


def _whole(lowest: int | None, highest: int | None) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def whole_number(text: str) -> int:
        value = int(text)
        if (lowest is not None and value < lowest) or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    return whole_number


if __name__ == "__main__":
    sys.exit(main())
