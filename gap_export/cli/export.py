"""``gap-export export MODEL``, which is also what ``gap-export MODEL`` means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli._describe import describe_holding, describe_tokens
from gap_export.cli._options import (
    KEEP_HELP,
    PRUNER_HELP,
    BudgetOption,
    CheckpointOption,
    DtypeOption,
    ExtraPositionOption,
    ExtraTokenOption,
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

if TYPE_CHECKING:
    from gap_export.pipeline import ExportReport


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
    extra_token: ExtraTokenOption = None,
    extra_position: ExtraPositionOption = "last",
    budget: BudgetOption = None,
    positions: PositionsOption = "gap",
    seed: SeedOption = 0,
    recipe: RecipeOption = None,
    checkpoint: CheckpointOption = None,
    dtype: DtypeOption = None,
    copy_weights: Annotated[
        bool,
        typer.Option(
            "--copy-weights",
            help="Copy weights that could be linked, for tools that refuse links.",
        ),
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="No checkpoint: noise of the model's true shape, for work on speed.",
        ),
    ] = False,
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
    from gap_export.source import parse_parts

    terminal = terminal_of(ctx)
    options = ExportOptions(
        model=model,
        keep_ratio=keep,
        pruner=pruner,
        order=order,
        extra_token=extra_token,
        extra_position=extra_position,
        budget=budget,
        positions=positions,
        seed=seed,
        out=out,
        force=force,
        recipe=recipe,
        checkpoint=parse_parts(checkpoint or []),
        dtype=dtype,
        copy_weights=copy_weights,
        random_weights=random_weights,
    )
    report = export_model(options, progress=terminal.progress())
    if as_json:
        terminal.json(report.to_plain())
        return
    terminal.result(str(report.bundle))
    terminal.message(_summarise(report))
    if report.manifest.dtype == "bfloat16":
        terminal.warning(
            "ONNX Runtime runs no bfloat16 graphs on a CPU: check and ground need a bundle made "
            "with --dtype float16 or float32"
        )
    if random_weights:
        terminal.warning("the weights are random: good for measuring speed, its answers are noise")


def _summarise(report: ExportReport) -> str:
    manifest, pruning = report.manifest, report.manifest.pruning
    size = format_size(sum(file.size for file in manifest.files))
    held = describe_holding(manifest)
    return (
        f"{manifest.model.name}: {describe_tokens(manifest)} ({pruning.pruner}, "
        f"{pruning.positions} positions), {len(manifest.graphs)} graphs, {manifest.dtype}, {size}"
        f"{f' ({held})' if held else ''}, {sum(report.seconds.values()):.1f} s"
    )
