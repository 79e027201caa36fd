"""The options of ``gap-export check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gap_export.errors import UsageError

NUM_SAMPLES = 50
_REPORT_FILE = "FILE"

AgainstOption = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="CHECKPOINT|GOLDEN",
        help="What to compare with: the checkpoint ([ROLE=]PATH, the same as --checkpoint), a "
        "golden made by --record, or of a bundle made by `gap-export patch` the export that was "
        "patched. [default: the checkpoint, where the bundle's was]",
    ),
]
BackendsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="ort|trt|openvino",
        help="What runs the bundle. ort: ONNX Runtime; trt: its TensorRT engines, on this "
        "machine's GPU; openvino: OpenVINO. Repeatable. [default: ort]",
    ),
]
LevelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--level",
        metavar="positions|tensor|token|box|task",
        help="What to compare: positions: the ids that RoPE sees; tensor: every output; token: "
        "answers; box: their boxes; task: Acc@0.5. Repeatable. [default: all]",
    ),
]
CheckSamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="N",
        min=1,
        help=f"How many expressions to ask. [default: {NUM_SAMPLES}; a golden's own]",
    ),
]
CheckSeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, help="Seed of the samples. [default: 0]")
]
ImagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--image", metavar="FILE", help="An image of your own to compare on as well; repeatable."
    ),
]
FailUnderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-under",
        metavar="LEVEL=SHARE",
        help="Share in 0..1 below which a level fails: of token and box the questions that agree "
        "but for ties, of task the Acc@0.5. Repeatable. positions and tensor have none: an id is "
        "right or wrong, and how far a tensor may be off depends on its dtype alone. [default: "
        "token=1, box=1; task: not significantly worse]",
    ),
]
PerLayerOption = Annotated[
    bool, typer.Option("--per-layer", help="Compare what the model's layers give as well.")
]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="ort|trt|openvino",
        help="Run this backend, and fail (exit code 3) where it cannot be run here; otherwise "
        "that is reported, and no failure. Repeatable.",
    ),
]
RecordOption = Annotated[
    Path | None,
    typer.Option(
        "--record",
        metavar="DIR",
        help="Judge nothing: write what PyTorch gives, in the dtype of --backend, as a golden "
        "that --against takes where there is no PyTorch.",
    ),
]
ReportJsonOption = Annotated[
    Path | None,
    typer.Option(
        "--report-json", metavar=_REPORT_FILE, help="Write the report as JSON: what --json prints."
    ),
]
JunitOption = Annotated[
    Path | None,
    typer.Option(
        "--junit",
        metavar=_REPORT_FILE,
        help="Write it as JUnit XML, a case for each backend and level.",
    ),
]
MarkdownOption = Annotated[
    Path | None,
    typer.Option(
        "--markdown", metavar=_REPORT_FILE, help="Write it as Markdown, for the summary of a job."
    ),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar=_REPORT_FILE,
        help="Write it as a page with plots, which needs nothing but itself.",
    ),
]


def parse_bars(
    values: Sequence[str], *, form: str = "LEVEL=SHARE", example: str = "token=0.98"
) -> dict[str, float]:
    """``["token=0.98"]`` as shares by level; which level may have one is no matter of syntax.

    Args:
        values: As given.
        form: What the command calls the two.
        example: For who gave something else.

    Raises:
        UsageError: not of that form, no number, or a level is named twice.
    """
    bars: dict[str, float] = {}
    for value in values:
        level, _, number = value.partition("=")
        try:
            share = float(number)
        except ValueError as err:
            raise UsageError(
                f"--fail-under takes {form}", seen=value, allowed=f"for example {example}"
            ) from err
        if level in bars:
            raise UsageError(
                f"--fail-under names a {form.partition('=')[0].lower()} twice", seen=level
            )
        bars[level] = share
    return bars
