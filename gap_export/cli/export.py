"""``gap-export export MODEL``, which is also what ``gap-export MODEL`` means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli._describe import describe_holding, describe_tokens
from gap_export.cli._engine_options import (
    BatchOption,
    BlockSizeOption,
    ExportDtypeOption,
    LmHeadOption,
    LoweringOption,
    MaxNewTokensOption,
    MaxPromptOption,
    QuantizerOption,
    TrtOption,
    WheelOption,
    split_dtype,
)
from gap_export.cli._options import (
    KEEP_OR_BOUND_HELP,
    PRUNER_HELP,
    BudgetOption,
    CheckpointOption,
    ExtraPositionOption,
    ExtraTokenOption,
    JsonOption,
    ModelArgument,
    OrderOption,
    PositionsOption,
    PrunerTextOption,
    QuietOption,
    RecipeOption,
    SeedOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._terminal import format_size, format_table
from gap_export.visible import visible, visible_strings

if TYPE_CHECKING:
    from gap_export.exporting import ExportReport


def export(
    ctx: typer.Context,
    model: ModelArgument,
    keep: Annotated[
        float | None,
        typer.Option("--keep", metavar="SHARE", help=KEEP_OR_BOUND_HELP, show_default=False),
    ] = None,
    pruner: Annotated[
        str | None, typer.Option("--pruner", metavar="NAME", help=PRUNER_HELP, show_default=False)
    ] = None,
    order: OrderOption = None,
    extra_token: ExtraTokenOption = None,
    extra_position: ExtraPositionOption = None,
    budget: BudgetOption = None,
    pruner_text: PrunerTextOption = None,
    positions: PositionsOption = "gap",
    seed: SeedOption = 0,
    recipe: RecipeOption = None,
    checkpoint: CheckpointOption = None,
    dtype: ExportDtypeOption = None,
    block_size: BlockSizeOption = None,
    quantizer: QuantizerOption = None,
    quantize_lm_head: LmHeadOption = False,
    trt: TrtOption = None,
    lowering: LoweringOption = None,
    max_prompt: MaxPromptOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    batch: BatchOption = 1,
    wheel: WheelOption = False,
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
    terminal = terminal_of(ctx)
    terminal.begin(f"exporting {model}")
    from gap_export.checkpoint.find.source import parse_parts
    from gap_export.exporting import ExportOptions, export_model

    graph_dtype, quantization = split_dtype(
        dtype, block_size=block_size, quantizer=quantizer, lm_head=quantize_lm_head
    )
    calibration = None
    if quantization is not None and quantization.method == "awq":
        from gap_export.evaluation.calibration import refshapes_questions

        calibration = tuple(refshapes_questions())
    options = ExportOptions(
        model=model,
        keep_ratio=keep,
        pruner=pruner,
        order=order,
        extra_token=extra_token,
        extra_position=extra_position,
        budget=budget,
        pruner_text=pruner_text,
        positions=positions,
        seed=seed,
        out=out,
        force=force,
        recipe=recipe,
        checkpoint=parse_parts(checkpoint or []),
        dtype=graph_dtype,
        copy_weights=copy_weights,
        random_weights=random_weights,
        quantization=quantization,
        calibration=calibration,
        targets=tuple(trt or ()),
        lowering=lowering,
        max_prompt=max_prompt,
        max_new_tokens=max_new_tokens,
        max_batch=batch,
        wheel=wheel,
    )
    report = export_model(options, progress=terminal.progress(), warn=terminal.warning)
    if as_json:
        terminal.json(report.to_plain())
        return
    terminal.result(visible(str(report.bundle)))
    terminal.message("\n".join([_summarise(report), *_describe_engines(report)]))
    if report.manifest.dtype == "bfloat16":
        terminal.warning(
            "ONNX Runtime runs no bfloat16 graphs on a CPU: check and ground need a bundle made "
            "with --dtype float16 or float32"
        )
    if random_weights:
        terminal.warning("the weights are random: good for measuring speed, its answers are noise")


def _summarise(report: ExportReport) -> str:
    manifest = visible_strings(report.manifest)
    pruning = manifest.pruning
    size = format_size(sum(file.size for file in manifest.files))
    held = describe_holding(manifest)
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
