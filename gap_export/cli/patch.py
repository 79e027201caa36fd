"""``gap-export patch DIR``: prune an ONNX export that another tool made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gap_export.cli._describe import describe_shared, describe_tokens
from gap_export.cli._options import (
    CopyWeightsOption,
    ForceBundleOption,
    JsonOption,
    OutOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._requests import Only, takes_requests
from gap_export.cli._terminal import format_size
from gap_export.spec.requests import PruningRequest
from gap_export.visible import visible, visible_strings

if TYPE_CHECKING:
    from gap_export.patching import PatchReport


@takes_requests
def patch(
    ctx: typer.Context,
    export: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with vision_encoder, embed_tokens and decoder_model_merged .onnx, "
            "config.json and tokenizer.json. It stays as it is.",
        ),
    ],
    pruning: Annotated[
        PruningRequest, Only(("keep_ratio", "pruner", "positions", "canvas", "seed"))
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="Recipe that says how the model is asked. [default: DIR/recipe.yaml, else the one "
            "whose sizes fit]",
        ),
    ] = None,
    variant: Annotated[
        Literal["fp32", "fp16"] | None,
        typer.Option("--variant", help="Which files, where there are several of a graph."),
    ] = None,
    copy_weights: CopyWeightsOption = False,
    out: OutOption = None,
    force: ForceBundleOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prune an ONNX export that another tool made; needs no PyTorch."""
    terminal = terminal_of(ctx)
    terminal.begin(f"patching {export}")
    from gap_export.api.make import patch as patch_export

    report = patch_export(
        export,
        pruning,
        recipe=recipe,
        variant=variant,
        copy_weights=copy_weights,
        out=out,
        force=force,
        progress=terminal.progress(),
    )
    if as_json:
        terminal.json(report.to_plain())
    else:
        terminal.result(visible(str(report.bundle)))
        terminal.message(_summarise(report))
    for warning in report.warnings:
        terminal.warning(warning)


def _summarise(report: PatchReport) -> str:
    manifest, rotary = visible_strings((report.manifest, report.rotary))
    pruning = manifest.pruning
    size = format_size(sum(file.size for file in manifest.files))
    held = describe_shared(manifest.files)
    return (
        f"{manifest.model.name}: {describe_tokens(manifest)} ({pruning.pruner}, "
        f"{pruning.positions} positions), {manifest.dtype}, opset {manifest.opset}, {size}"
        f"{f' ({held})' if held else ''}\n"
        f"GapRemap feeds {len(rotary)} nodes of RoPE: {', '.join(rotary[:2])}"
        f"{', ...' if len(rotary) > 2 else ''}"
    )
