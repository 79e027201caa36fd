"""``python -m gap_export.engines build BUNDLE --target orin``: on a device that has nothing else.

Standard library, numpy and a TensorRT package alone; ``gap-export build`` does the same where the
whole package is installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from gap_export.engines.build import LimitOverrides
from gap_export.engines.command import describe_folders, run_build
from gap_export.engines.compile import BuildOptions
from gap_export.engines.targets import TARGETS
from gap_export.errors import ExitCode, GapExportError
from gap_export.progress import Advance, Progress, SilentProgress
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
        overrides=LimitOverrides(
            max_prompt=options.max_prompt,
            max_new_tokens=options.max_new_tokens,
            max_batch=options.batch,
        ),
        options=BuildOptions(
            weights=options.weights,
            workspace_mib=options.workspace,
            optimization_level=options.optimization_level,
        ),
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
    for flag, text in (
        ("--max-prompt", "longest pruned prompt, in tokens"),
        ("--max-new-tokens", "longest answer, in tokens"),
        ("--batch", "most expressions at a time"),
    ):
        build.add_argument(flag, metavar="N", type=int, help=f"{text} (default: the bundle's)")
    build.add_argument(
        "--workspace",
        metavar="MIB",
        type=_positive,
        help="most memory a layer may take for itself (default: all there is)",
    )
    build.add_argument(
        "--weights",
        choices=("included", "streamed", "stripped"),
        default="included",
        help="where the engines' weights are (default: %(default)s)",
    )
    build.add_argument(
        "--optimization-level",
        choices=range(6),
        type=int,
        help="how long TensorRT looks for fast kernels (default: TensorRT's own)",
    )
    build.add_argument("-q", "--quiet", action="store_true", help="nothing but errors on stderr")
    build.add_argument("-v", "--verbose", action="store_true", help="TensorRT's own messages")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
