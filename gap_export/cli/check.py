"""``gap-export check BUNDLE``: does it compute what PyTorch computes?"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli._options import (
    BACKENDS,
    BackendOption,
    BundleArgument,
    CheckpointOption,
    EnginesOption,
    JsonOption,
    QuietOption,
    SamplesOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._terminal import format_table
from gap_export.errors import ParityError

if TYPE_CHECKING:
    from gap_export.parity.check import ParityReport, Question


def check(
    ctx: typer.Context,
    bundle: BundleArgument,
    checkpoint: CheckpointOption = None,
    samples: SamplesOption = 50,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the samples.")] = 0,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="A picture of yours to compare on as well; repeatable.",
            show_default=False,
        ),
    ] = None,
    backend: BackendOption = "ort",
    engines: EnginesOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare a bundle with PyTorch.

    Every output, every token, every box; exit code 3 where they differ.
    """
    from gap_export.bundle import open_bundle
    from gap_export.parity.check import check_bundle
    from gap_export.source import parse_parts, resolve_source

    terminal = terminal_of(ctx)
    parts = parse_parts(checkpoint or [])
    manifest = open_bundle(bundle, verify="full").manifest
    recipe, source = resolve_source(manifest, parts)
    report = check_bundle(
        bundle,
        recipe=recipe,
        checkpoint=source,
        questions=_questions(samples, seed, image or []),
        backend=BACKENDS[backend],
        engines=engines,
        progress=terminal.progress(),
    )
    if as_json:
        terminal.json(report.to_plain())
    else:
        terminal.result(_describe(report))
    if not report.passed:
        raise ParityError(
            "the bundle does not agree with PyTorch",
            seen=", ".join(_failures(report)),
            fix="see the report above; export the bundle again, and report it if it stays",
        )


def _questions(num_samples: int, seed: int, images: list[Path]) -> list[Question]:
    """Held-out samples; each picture of the user's is asked about with one of their expressions."""
    from gap_export.evaluation.refshapes import iter_samples
    from gap_export.parity.check import Question

    samples = list(iter_samples(seed=seed, num_samples=num_samples))
    questions = [Question(image=s.image, expression=s.expression.text) for s in samples]
    extra = zip(images, cycle(samples), strict=False)
    return questions + [Question(image=i, expression=s.expression.text) for i, s in extra]


def _describe(report: ParityReport) -> str:
    rows = [
        [
            row.component,
            row.output,
            str(row.calls),
            f"{row.max_abs_diff:.1e}",
            f"{row.max_abs_reference:.1e}",
            f"{row.atol:.0e}",
            f"{row.rtol:.0e}",
            "ok" if row.passed else f"FAILED: {row.reason}",
        ]
        for row in report.outputs
    ]
    header = ["component", "output", "calls", "max diff", "max value", "atol", "rtol", "verdict"]
    lines = [
        f"compared with {report.reference}",
        "",
        format_table(header, rows),
        "",
        f"same tokens: {report.equal_tokens} of {report.num_questions}",
        f"same boxes:  {report.equal_boxes} of {report.num_questions}",
    ]
    if report.ties:
        lines.append(f"ties:        {report.ties}, where PyTorch itself is undecided")
    lines += [
        f'"{item["expression"]}": {item["reference"]} -> {item["candidate"]}'
        for item in report.differing
    ]
    lines.append("passed" if report.passed else "FAILED")
    return "\n".join(lines)


def _failures(report: ParityReport) -> list[str]:
    failures = [f"{row.component} {row.output}" for row in report.outputs if not row.passed]
    for what, equal in (("tokens", report.equal_tokens), ("boxes", report.equal_boxes)):
        unexplained = report.num_questions - equal - report.ties
        if unexplained > 0:
            failures.append(f"{unexplained} answers with other {what}")
    return failures
