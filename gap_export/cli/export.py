"""``gap-export export MODEL``, which is also what ``gap-export MODEL`` means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export.cli._options import (
    KEEP_HELP,
    PRUNER_HELP,
    JsonOption,
    ModelArgument,
    OrderOption,
    PositionsOption,
    QuietOption,
    RecipeOption,
    SeedOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._terminal import format_size


def export(
    ctx: typer.Context,
    model: ModelArgument,
    keep: Annotated[
        float | None, typer.Option("--keep", metavar="SHARE", help=KEEP_HELP, show_default=False)
    ] = None,
    pruner: Annotated[
        str | None, typer.Option("--pruner", metavar="NAME", help=PRUNER_HELP, show_default=False)
    ] = None,
    order: OrderOption = None,
    positions: PositionsOption = "gap",
    seed: SeedOption = 0,
    recipe: RecipeOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="The bundle. [default: ./<model>-<pruner>-<keep>]"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle that is there; nothing else.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Export a pruned model; the default command."""
    from gap_export.pipeline import ExportOptions, export_model

    terminal = terminal_of(ctx)
    options = ExportOptions(
        model=model,
        keep_ratio=keep,
        pruner=pruner,
        order=order or "raster",
        positions=positions,
        seed=seed,
        out=out,
        force=force,
        recipe=recipe,
    )
    report = export_model(options, progress=terminal.progress())
    if as_json:
        terminal.json(report.to_plain())
        return
    pruning = report.manifest.pruning
    size = format_size(sum(file.size for file in report.manifest.files))
    terminal.result(str(report.bundle))
    terminal.message(
        f"{report.manifest.model.name}: {pruning.num_kept_tokens} of "
        f"{pruning.num_visual_tokens} visual tokens ({pruning.pruner}, {pruning.positions} "
        f"positions), {len(report.manifest.graphs)} graphs, {size}, "
        f"{sum(report.seconds.values()):.1f} s"
    )
