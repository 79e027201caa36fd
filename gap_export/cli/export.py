"""``gap-export export MODEL``, which is also what ``gap-export MODEL`` means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli._describe import describe_shared, describe_tokens
from gap_export.cli._options import (
    CheckpointOption,
    CopyWeightsOption,
    ForceBundleOption,
    JsonOption,
    ModelArgument,
    OutOption,
    QuietOption,
    RecipeOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._requests import takes_requests
from gap_export.cli._terminal import format_size, format_table
from gap_export.spec.requests import EnginesRequest, PruningRequest, WeightsRequest
from gap_export.visible import visible, visible_strings

if TYPE_CHECKING:
    from gap_export.exporting import ExportReport


@takes_requests
def export(
    ctx: typer.Context,
    model: ModelArgument,
    pruning: PruningRequest,
    weights: WeightsRequest,
    engines: EnginesRequest,
    recipe: RecipeOption = None,
    checkpoint: CheckpointOption = None,
    copy_weights: CopyWeightsOption = False,
    bake_positions: Annotated[
        bool,
        typer.Option(
            "--bake-positions",
            help="The decoder holds kept_positions, for runtimes that feed position_ids alone; "
            "where pruner and image's place are fixed.",
        ),
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="No checkpoint: noise of the model's true shape, for work on speed.",
        ),
    ] = False,
    out: OutOption = None,
    force: ForceBundleOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Export a pruned model; the default command."""
    terminal = terminal_of(ctx)
    terminal.begin(f"exporting {model}")
    from gap_export.api.make import export as export_bundle
    from gap_export.checkpoint.find.source import parse_parts

    report = export_bundle(
        model,
        pruning,
        weights=weights,
        engines=engines,
        recipe=recipe,
        checkpoint=parse_parts(checkpoint or []),
        copy_weights=copy_weights,
        bake_positions=bake_positions,
        random_weights=random_weights,
        out=out,
        force=force,
        progress=terminal.progress(),
        warn=terminal.warning,
    )
    if as_json:
        terminal.json(report.to_plain())
        return
    terminal.result(visible(str(report.bundle)))
    terminal.message("\n".join([_summarise(report), *_describe_engines(report)]))
    if report.manifest.dtype == "bfloat16":
        terminal.warning(
            "ONNX Runtime runs no bfloat16 graphs on a CPU: check and ground need a bundle made "
            "with --for cpu"
        )
    if random_weights:
        terminal.warning("the weights are random: good for measuring speed, its answers are noise")


def _summarise(report: ExportReport) -> str:
    manifest = visible_strings(report.manifest)
    pruning = manifest.pruning
    size = format_size(sum(file.size for file in manifest.files))
    held = describe_shared(manifest.files)
    return (
        f"{manifest.model.name}: {describe_tokens(manifest)} ({pruning.pruner}, "
        f"{pruning.positions} positions), {len(manifest.graphs)} graphs, {manifest.dtype}, {size}"
        f"{f' ({held})' if held else ''}"
    )


def _describe_engines(report: ExportReport) -> list[str]:
    """What was built, what is left to build and where, and what is known of that beforehand."""
    lines = []
    for folder in report.engines:
        size = sum(engine.size for engine in folder.plan.engines)
        components = ", ".join(engine.component for engine in folder.plan.engines)
        lines.append(f"engines/{folder.path.name}: {components}; {format_size(size)}")
    lines += [f"{name}: prepared, not built: {why}" for name, why in report.prepared.items()]
    verdicts = [
        [target.name, target.lowering, v.component, v.verdict, ", ".join(v.operators)]
        for target in report.manifest.targets
        for v in target.preflight
    ]
    if verdicts:
        header = ["target", "lowering", "component", "pre-flight", "operators"]
        lines += ["", format_table(header, verdicts)]
    return lines
