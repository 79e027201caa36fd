"""``gap-export ground BUNDLE SOURCE EXPRESSION...``: the box, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gap_export.cli._frames import FrameOptions, SavedOutput, check_save, ground_frames
from gap_export.cli._options import (
    BACKENDS,
    BackendOption,
    BundleArgument,
    CpuThreadsOption,
    EnginesOption,
    FormOption,
    GrammarOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._outputs import ForceOption, output_rule
from gap_export.cli._requests import takes_requests
from gap_export.cli._terminal import Terminal
from gap_export.spec.requests import OpenVinoOptions
from gap_export.visible import visible

if TYPE_CHECKING:
    from gap_export.runtime.session import GroundingSession


@takes_requests
def ground(
    ctx: typer.Context,
    bundle: BundleArgument,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An image file; or many frames: a folder, a pattern, a video file, a camera's "
            "number, or an address of rtsp://.",
        ),
    ],
    expressions: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPRESSION", help='What to find: "the small red circle". Repeatable.'
        ),
    ],
    openvino: OpenVinoOptions,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE",
            help="Write the image with the box and the kept tokens; of many frames, an .mp4 with "
            "the boxes.",
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            "--every", metavar="N", min=1, help="Of many frames: ask about the first of every N."
        ),
    ] = None,
    newest: Annotated[
        bool,
        typer.Option(
            "--newest",
            help="Of a camera or a video: answer the newest frame, and drop those that came in the "
            "meantime. A video file runs at its own speed. [default: answer every frame]",
        ),
    ] = False,
    same_frame: Annotated[
        float | None,
        typer.Option(
            "--same-frame",
            metavar="SHARE",
            help="Of many frames: skip one that is the same as the last one answered, by this "
            "sameness or more, in (0, 1]: 1 less the largest difference of 32 x 32 mean colors.",
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
    max_boxes: Annotated[
        int,
        typer.Option(
            "--max-boxes",
            metavar="N",
            min=1,
            max=100,
            help="How many boxes of an answer to read: Qwen-VL, InternVL, MiniGPT-v2 write lists.",
        ),
    ] = 1,
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
    threads: CpuThreadsOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find something in an image, or in many frames; prints JSON, of many a line a frame."""
    terminal = terminal_of(ctx)
    terminal.begin(f"opening {bundle}")
    from gap_export.runtime.session import GroundingSession
    from gap_export.streaming.sources import find_source

    found = find_source(source)
    files = [source] if found is None else found.files
    rule = output_rule(force=force, inputs={"SOURCE": files}, outside={"the bundle": bundle})
    options = FrameOptions(every=every, newest=newest, same_frame=same_frame)
    options.check(found)
    check_save(save, rule, found)
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
        max_boxes=max_boxes,
    ) as session:
        output = SavedOutput(save, rule)
        if found is None and len(expressions) == 1:
            _ground_image(
                terminal, session, source, expressions[0], output, allow_damaged=allow_damaged
            )
        else:
            ground_frames(
                terminal,
                session,
                found or source,
                expressions,
                options,
                output,
                allow_damaged=allow_damaged,
            )


def _ground_image(
    terminal: Terminal,
    session: GroundingSession,
    image: str,
    expression: str,
    output: SavedOutput,
    *,
    allow_damaged: bool,
) -> None:
    """One image, one expression: a document that people can read, and a drawing of all there is."""
    from gap_export.runtime.drawing import draw_grounding, save_drawing

    grounding = session.ground(image, expression, allow_damaged=allow_damaged)
    for text in grounding.warnings:
        terminal.warning(text)
    for grid in grounding.tokens:
        if grid.stood_out is not None:
            terminal.message(f"stood out {grid.stood_out}, kept {len(grid.kept)} visual tokens")
    terminal.json({"image": image, **grounding.to_plain()})
    if output.path is not None:
        pad_color = session.manifest.image.pad_color
        drawing = draw_grounding(image, grounding, pad_color=pad_color, allow_damaged=allow_damaged)
        save_drawing(drawing, output.path, rule=output.rule)
        terminal.message(f"wrote {visible(str(output.path))}")
