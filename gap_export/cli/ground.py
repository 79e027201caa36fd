"""``gap-export ground BUNDLE IMAGE EXPRESSION``: the box, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gap_export.cli._options import (
    BACKENDS,
    BackendOption,
    BundleArgument,
    EnginesOption,
    FormOption,
    GrammarOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._outputs import ForceOption, output_rule
from gap_export.cli._requests import takes_requests
from gap_export.errors import UsageError
from gap_export.spec.requests import OpenVinoOptions
from gap_export.visible import visible


@takes_requests
def ground(
    ctx: typer.Context,
    bundle: BundleArgument,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help='What to find: "the small red circle".')
    ],
    openvino: OpenVinoOptions,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", metavar="FILE", help="Write the image with the box and the kept tokens."
        ),
    ] = None,
    force: ForceOption = False,
    allow_damaged: Annotated[
        bool,
        typer.Option(
            "--allow-damaged",
            help="Use what can be decoded of a damaged image, with a warning. [default: refuse it]",
        ),
    ] = False,
    verify: Annotated[
        Literal["stamp", "full"],
        typer.Option(
            "--verify", help="stamp: hash what changed since the last time; full: every byte."
        ),
    ] = "stamp",
    grammar: GrammarOption = None,
    backend: BackendOption = "ort",
    engines: EnginesOption = None,
    form: FormOption = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider",
            metavar="NAME",
            help="CPUExecutionProvider or CUDAExecutionProvider, best first; repeatable. "
            "[default: CUDA where it loads, else the CPU]",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, help="CPU threads. [default: all]"),
    ] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find something in an image; prints JSON."""
    terminal = terminal_of(ctx)
    terminal.begin(f"opening {bundle}")
    from gap_export.runtime.drawing import check_drawing_path, draw_grounding, save_drawing
    from gap_export.runtime.session import GroundingSession

    rule = output_rule(force=force, inputs={"IMAGE": [image]}, outside={"the bundle": bundle})
    if save is not None:
        check_drawing_path(save, rule)
    elif force:
        raise UsageError("--force cannot be used here: no file is to be written")
    with GroundingSession.open(
        bundle,
        backend=BACKENDS[backend],
        engines=engines,
        form=form,
        execution_providers=provider,
        num_threads=threads,
        openvino=openvino,
        verify=verify,
        grammar=grammar,
    ) as session:
        pad_color = session.manifest.image.pad_color
        grounding = session.ground(image, expression, allow_damaged=allow_damaged)
    for text in grounding.warnings:
        terminal.warning(text)
    for grid in grounding.tokens:
        if grid.stood_out is not None:
            terminal.message(f"stood out {grid.stood_out}, kept {len(grid.kept)} visual tokens")
    terminal.json({"image": str(image), **grounding.to_plain()})
    if save is not None:
        drawing = draw_grounding(image, grounding, pad_color=pad_color, allow_damaged=allow_damaged)
        save_drawing(drawing, save, rule=rule)
        terminal.message(f"wrote {visible(str(save))}")
