"""``gap-export bench BUNDLE...``: how fast is it, and what is it fast in?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export.cli._check_options import (
    HtmlOption,
    MarkdownOption,
    ReportJsonOption,
    parse_bars,
)
from gap_export.cli._options import JsonOption, QuietOption, VerboseOption, terminal_of
from gap_export.cli._outputs import ForceOption, output_rule
from gap_export.errors import ParityError

BundlesArgument = Annotated[
    list[Path], typer.Argument(metavar="BUNDLE...", help="Folders of bundles of one checkpoint.")
]
UnprunedOption = Annotated[
    Path | None,
    typer.Option(
        "--unpruned",
        metavar="BUNDLE",
        help="One more, which drops nothing, that speed-up is told against. [default: what of "
        "the BUNDLEs drops nothing]",
    ),
]
BackendsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="BACKEND[:FORM]",
        help="What runs each bundle. ort: ONNX Runtime in the fastest form of its graphs, ort:base "
        "and ort:ort in that form; openvino: OpenVINO, openvino:bfloat16 computing in that; trt: "
        "its TensorRT engines. Repeatable: all are measured side by side, and the best is named. "
        "[default: ort]",
    ),
]
RoundsOption = Annotated[
    int,
    typer.Option("--rounds", metavar="N", min=1, help="Answers of each, about another image each."),
]
WarmUpOption = Annotated[
    int, typer.Option("--warm-up", metavar="N", min=1, help="Answers before those.")
]
ExpressionsOption = Annotated[
    int,
    typer.Option(
        "--expressions",
        metavar="N",
        min=1,
        help="Beyond 1, time as many expressions about each image as well.",
    ),
]
TokensOption = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        metavar="N",
        min=1,
        help="Tokens of every answer. [default: as many as the model says]",
    ),
]
ImagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="An image of your own; repeatable. [default: scenes of RefShapes]",
    ),
]
TextsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--expression",
        metavar="TEXT",
        help="An expression of your own; repeatable. [default: the scenes' own]",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="Threads of one operator. [default: the runtime decides]",
    ),
]
FailUnderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-under",
        metavar="speedup=X",
        help="Exit code 3 where a pruned bundle answers less than X times as fast as the unpruned "
        "one; in place of speedup also a stage, such as prefill. Repeatable.",
    ),
]


def bench(
    ctx: typer.Context,
    bundle: BundlesArgument,
    unpruned: UnprunedOption = None,
    backend: BackendsOption = None,
    rounds: RoundsOption = 5,
    warm_up: WarmUpOption = 1,
    expressions: ExpressionsOption = 1,
    tokens: TokensOption = None,
    image: ImagesOption = None,
    expression: TextsOption = None,
    threads: ThreadsOption = None,
    fail_under: FailUnderOption = None,
    report_json: ReportJsonOption = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure time, memory and speed-up of bundles, side by side.

    Each in a process of its own, all asked in turn; see the page on speed.
    """
    terminal = terminal_of(ctx)
    terminal.begin(f"measuring {', '.join(map(str, bundle))}")
    from gap_export.api.bench import bench as measure
    from gap_export.report import check_writable, write_reports

    named = [*bundle, *([unpruned] if unpruned is not None else [])]
    rule = output_rule(
        force=force,
        inputs={"--image": image or ()},
        outside={f"the bundle {path}": path for path in named},
    )
    check_writable(json=report_json, markdown=markdown, html=html, rule=rule)
    report = measure(
        bundle,
        unpruned=unpruned,
        backends=backend or ["ort"],
        rounds=rounds,
        warm_up=warm_up,
        expressions_per_image=expressions,
        answer_tokens=tokens,
        images=image or (),
        expressions=expression or (),
        num_threads=threads,
        fail_under=parse_bars(fail_under or [], form="STAGE=TIMES", example="speedup=2.0"),
        progress=terminal.progress(),
    )
    write_reports(report, json=report_json, markdown=markdown, html=html, rule=rule)
    if as_json:
        terminal.json(report.to_plain())
    else:
        from gap_export.cli._describe_bench import describe_report

        terminal.result(describe_report(report))
    for text in report.warnings:
        terminal.warning(text)
    if report.failures:
        raise ParityError(
            "a pruned bundle is not as fast as asked for", seen="; ".join(report.failures)
        )
