"""``gap-export build BUNDLE --target rtx:sm89``: TensorRT engines from a bundle."""

from __future__ import annotations

from typing import Annotated

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


@takes_requests
def build(
    ctx: typer.Context,
    bundle: BundleArgument,
    target: Annotated[
        list[str],
        typer.Option(
            "--target", metavar="TARGET", help="rtx, rtx:sm89, desktop, orin or thor. Repeatable."
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
    from gap_export.api.make import build as build_engines
    from gap_export.engines.command import describe_folders

    folders = build_engines(
        bundle,
        target,
        only=only or (),
        limits=limits,
        options=options,
        progress=terminal.progress(),
        warn=terminal.warning,
    )
    built = describe_folders(folders)
    if as_json:
        terminal.json(built)
        return
    rows = [
        [
            entry["folder"],
            entry["component"],
            format_size(entry["size_bytes"]),
            f"{entry['build_seconds']:.1f}",
            format_size(entry["peak_memory_bytes"]),
        ]
        for entry in built
    ]
    lines = [format_table(["target", "component", "size", "build s", "peak memory"], rows)]
    terminal.result("\n".join([*lines, *(f"in {visible(str(one.path))}" for one in folders)]))
