"""``gap-export build BUNDLE --target rtx:sm89``: TensorRT engines from a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gap_export.cli._options import (
    BundleArgument,
    JsonOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._requests import takes_requests
from gap_export.cli._terminal import format_size, format_table
from gap_export.spec.requests import BuildOptions, LimitsRequest
from gap_export.visible import visible

if TYPE_CHECKING:
    from gap_export.engines.folder import EngineFolder


@takes_requests
def build(
    ctx: typer.Context,
    bundle: BundleArgument,
    target: Annotated[
        list[str],
        typer.Option(
            "--target",
            metavar="TARGET",
            help="rtx, rtx:sm89, desktop, orin or thor. Repeatable.",
            show_default=False,
        ),
    ],
    limits: LimitsRequest,
    options: BuildOptions,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="COMPONENT",
            help="Build this component alone; other engines stay. Repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Build TensorRT engines into a bundle.

    For rtx on any machine; for the other targets on the GPU they are for.
    """
    terminal = terminal_of(ctx)
    terminal.begin(f"building engines for {', '.join(target)} in {bundle}")
    from gap_export.engines.command import run_build

    folders = run_build(
        bundle,
        target,
        only=only or (),
        overrides=limits,
        options=options,
        progress=terminal.progress(),
        warn=terminal.warning,
    )
    if as_json:
        from gap_export.engines.command import describe_folders

        terminal.json(describe_folders(folders))
    else:
        terminal.result(_describe(folders))


def _describe(folders: list[EngineFolder]) -> str:
    from gap_export.engines.command import describe_folders

    rows = [_row(entry) for entry in describe_folders(folders)]
    header = ["target", "component", "size", "build s", "peak memory"]
    lines = [format_table(header, rows)]
    lines += [f"in {visible(str(folder.path))}" for folder in folders]
    return "\n".join(lines)


def _row(entry: dict[str, Any]) -> list[str]:
    return [
        entry["folder"],
        entry["component"],
        format_size(entry["size_bytes"]),
        f"{entry['build_seconds']:.1f}",
        format_size(entry["peak_memory_bytes"]),
    ]
