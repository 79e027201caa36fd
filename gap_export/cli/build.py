"""``gap-export build BUNDLE --target rtx:sm89``: TensorRT engines from a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gap_export.cli._options import (
    BundleArgument,
    JsonOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._terminal import format_size, format_table
from gap_export.visible import visible

if TYPE_CHECKING:
    from gap_export.engines.folder import EngineFolder


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
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="COMPONENT",
            help="Build this component alone; other engines stay. Repeatable.",
            show_default=False,
        ),
    ] = None,
    max_prompt: Annotated[
        int | None,
        typer.Option(
            "--max-prompt",
            metavar="N",
            help="Longest pruned prompt an engine takes, in tokens. [default: the bundle's]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            help="Longest answer an engine's cache has room for. [default: the bundle's]",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            help="Most expressions at a time an engine takes. [default: the bundle's]",
            show_default=False,
        ),
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option(
            "--workspace",
            metavar="MIB",
            min=1,
            help="Most memory a layer may take for itself. [default: all there is]",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Literal["included", "streamed", "stripped"],
        typer.Option(
            "--weights",
            help="included in the engines; streamed: may partly stay in the host's memory; "
            "stripped: put in when an engine is loaded.",
        ),
    ] = "included",
    optimization_level: Annotated[
        int | None,
        typer.Option(
            "--optimization-level",
            metavar="N",
            min=0,
            max=5,
            help="How long TensorRT looks for fast kernels. [default: TensorRT's own]",
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
    from gap_export.engines.build import LimitOverrides
    from gap_export.engines.command import describe_folders, run_build
    from gap_export.engines.compile import BuildOptions

    folders = run_build(
        bundle,
        target,
        only=only or (),
        overrides=LimitOverrides(
            max_prompt=max_prompt, max_new_tokens=max_new_tokens, max_batch=batch
        ),
        options=BuildOptions(
            weights=weights, workspace_mib=workspace, optimization_level=optimization_level
        ),
        progress=terminal.progress(),
        warn=terminal.warning,
    )
    if as_json:
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
