"""``gap-export plan MODEL``: will it fit, how fast will it be, and what is to be exported?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from gap_export.cli._check_options import HtmlOption, MarkdownOption, ReportJsonOption
from gap_export.cli._options import (
    JsonOption,
    ModelArgument,
    QuietOption,
    RecipeOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._outputs import ForceOption, output_rule
from gap_export.errors import ParityError, UsageError

_MILLISECONDS = {"ms": 1.0, "s": 1e3}
_GIGABYTES = {"MB": 1e-3, "GB": 1.0, "MiB": 2**20 / 1e9, "GiB": 2**30 / 1e9}

DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where it is to run, such as orin-nano-8gb; this-cpu measures this machine.",
    ),
]
DeviceFileOption = Annotated[
    Path | None,
    typer.Option("--device-file", metavar="FILE", help="Devices of your own, in YAML."),
]
MeasuredOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--measured",
        metavar="FILE",
        help="What bench --json printed on the device; repeatable. Narrows the ranges.",
    ),
]
LatencyOption = Annotated[
    str | None, typer.Option("--latency", metavar="TIME", help="Budget of an answer, e.g. 250ms.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Budget, e.g. 6GB. [default: the device's]"),
]
KeepsOption = Annotated[
    list[float] | None,
    typer.Option("--keep", metavar="SHARE", help="Look at this one; repeatable. [default: six]"),
]
PrunersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pruner",
        metavar="NAME",
        help="Look at this one; repeatable; all: every one that the model can serve. [default: "
        "the recipe's]",
    ),
]
DtypesOption = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="DTYPE", help="Look at this one; repeatable."),
]
CanvasesOption = Annotated[
    list[str] | None,
    typer.Option("--canvas", metavar="WxH", help="Look at this one; repeatable."),
]
AnswerOption = Annotated[
    int, typer.Option("--tokens", metavar="N", min=1, help="Tokens of an answer.")
]
TextOption = Annotated[
    int | None,
    typer.Option(
        "--text-tokens",
        metavar="N",
        min=1,
        help="Tokens of a prompt beside the visual ones. [default: by the recipe's words]",
    ),
]


def plan(
    ctx: typer.Context,
    model: ModelArgument,
    device: DeviceOption = "this-cpu",
    device_file: DeviceFileOption = None,
    measured: MeasuredOption = None,
    latency: LatencyOption = None,
    memory: MemoryOption = None,
    keep: KeepsOption = None,
    pruner: PrunersOption = None,
    dtype: DtypesOption = None,
    canvas: CanvasesOption = None,
    tokens: AnswerOption = 32,
    text_tokens: TextOption = None,
    recipe: RecipeOption = None,
    report_json: ReportJsonOption = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say what fits a device and how fast it will be, before any export."""
    terminal = terminal_of(ctx)
    latency_ms = parse_amount("--latency", latency, _MILLISECONDS, example="250ms")
    memory_gb = parse_amount("--memory", memory, _GIGABYTES, example="6GB")
    terminal.begin(f"planning {model} on {device}")
    from gap_export.api.plan import plan as make_plan
    from gap_export.report import check_writable, write_reports

    rule = output_rule(force=force, inputs={"--measured": measured or ()}, outside={})
    check_writable(json=report_json, markdown=markdown, html=html, rule=rule)
    report = make_plan(
        model,
        device=device,
        device_file=device_file,
        measured=measured or (),
        latency_ms=latency_ms,
        memory_gb=memory_gb,
        keep=keep or (),
        pruners=pruner or (),
        dtypes=dtype or (),
        canvases=canvas or (),
        answer_tokens=tokens,
        text_tokens=text_tokens,
        recipe=recipe,
        progress=terminal.progress(),
    )
    write_reports(report, json=report_json, markdown=markdown, html=html, rule=rule)
    if as_json:
        terminal.json(report.to_plain())
    else:
        from gap_export.cli._describe_bench import describe_report

        terminal.result(describe_report(report))
    if report.best is None:
        from gap_export.report.plan import describe_nearest

        raise ParityError(
            f"nothing of {report.model} meets the budget on {report.device}",
            seen=describe_nearest(report),
            fix="a smaller model, a larger budget, or another --device",
        )


def parse_amount(
    flag: str, text: str | None, units: dict[str, float], *, example: str
) -> float | None:
    """A number with its unit, such as ``250ms``.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s?([A-Za-z]+)", text[:50], re.ASCII)
    if found is None or found[2] not in units or float(found[1]) <= 0:
        raise UsageError(
            f"{flag} is a number above 0 with its unit",
            seen=text[:50],
            allowed=", ".join(units),
            fix=f"write it like {flag} {example}",
        )
    return float(found[1]) * units[found[2]]
