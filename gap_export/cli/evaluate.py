"""``gap-export eval MODEL|BUNDLE``: accuracy unpruned, compact and with GAP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli._check_options import HtmlOption, MarkdownOption, ReportJsonOption
from gap_export.cli._evaluate_options import (
    AbsentOption,
    BaselineOption,
    DataOption,
    EvaluateSamplesOption,
    KeepsOption,
    MinRecoveredOption,
    MisalignedOption,
    PicturesOption,
    PromptOption,
    ProtocolOption,
    PrunersOption,
    RecordsOption,
    TargetArgument,
    WorkersOption,
    check_beside_folders,
    split_names,
)
from gap_export.cli._options import (
    BackendOption,
    CheckpointOption,
    EnginesOption,
    FormOption,
    GrammarOption,
    JsonOption,
    QuietOption,
    RecipeOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._outputs import ForceOption, output_rule, with_sources
from gap_export.cli._requests import Only, takes_requests
from gap_export.errors import ParityError, UsageError
from gap_export.spec.requests import OpenVinoOptions, PruningRequest, WeightsRequest
from gap_export.stop_signals import Stopped
from gap_export.visible import visible

if TYPE_CHECKING:
    from gap_export.cli._terminal import Terminal
    from gap_export.evaluation.results import EvaluationReport


# The other options of a pruning are repeatable here, or measured both ways.
_CHOICES = (
    "order",
    "extra_token",
    "extra_position",
    "budget",
    "pruner_text",
    "attention",
    "canvas",
    "seed",
)
_WEIGHTS = ("dtype", "vision_dtype", "quantize_lm_head", "activations", "runs_on")


@takes_requests
def evaluate(
    ctx: typer.Context,
    target: TargetArgument,
    pruning: Annotated[PruningRequest, Only(_CHOICES)],
    weights: Annotated[WeightsRequest, Only(_WEIGHTS)],
    openvino: OpenVinoOptions,
    keep: KeepsOption = None,
    pruner: PrunersOption = None,
    misaligned: MisalignedOption = None,
    recipe: RecipeOption = None,
    data: DataOption = "refshapes",
    samples: EvaluateSamplesOption = None,
    absent: AbsentOption = 0.0,
    protocol: ProtocolOption = "native",
    prompt: PromptOption = None,
    grammar: GrammarOption = None,
    baseline: BaselineOption = None,
    checkpoint: CheckpointOption = None,
    backend: BackendOption = "ort",
    engines: EnginesOption = None,
    form: FormOption = None,
    workers: WorkersOption = "1",
    records: RecordsOption = None,
    pictures: PicturesOption = None,
    min_recovered: MinRecoveredOption = None,
    report_json: ReportJsonOption = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure Acc@0.5 unpruned, compact and with GAP."""
    terminal = terminal_of(ctx)
    terminal.begin(f"measuring {target}")
    from gap_export.api import evaluate as api
    from gap_export.checkpoint.find.source import parse_parts
    from gap_export.report import check_writable, write_reports

    parts = parse_parts(checkpoint or [])
    rule = output_rule(
        force=force,
        inputs={"MODEL": [target], "--data": [data], "--checkpoint": checkpoint or []},
        outside=api.bundles_of(target, baseline),
    )
    for option, folder in {"--records": records, "--pictures": pictures}.items():
        if folder is not None:
            rule.check_outside(option, folder)
    rule = with_sources(rule, _sources(target, recipe, parts))
    check_writable(json=report_json, markdown=markdown, html=html, rule=rule)
    reports = {"--report-json": report_json, "--markdown": markdown, "--html": html}
    check_beside_folders(reports, records=records, pictures=pictures)
    with _telling_how_to_go_on(terminal, records):
        report = api.evaluate(
            target,
            pruning.variants(split_names("--pruner", pruner or []), keep or ()),
            data=data,
            samples=samples,
            absent=absent,
            seed=pruning.seed,
            protocol=protocol,
            prompt=prompt,
            grammar=grammar,
            misaligned=split_names("--misaligned", misaligned or []),
            weights=weights,
            recipe=recipe,
            checkpoint=parts,
            baseline=baseline,
            backend=backend,
            engines=engines,
            form=form,
            openvino=openvino,
            workers=workers,
            records=records,
            pictures=pictures,
            rule=rule,
            progress=terminal.progress(),
        )
    write_reports(report, json=report_json, markdown=markdown, html=html, rule=rule)
    if as_json:
        terminal.json(report.to_plain())
    else:
        from gap_export.cli._describe_evaluation import describe_evaluation

        terminal.result(describe_evaluation(report))
    if min_recovered is not None:
        for text in report.warnings:
            terminal.warning(text)
        _check_bar(report, min_recovered)
    elif report.warnings:
        raise ParityError("; ".join(report.warnings))


def _sources(target: str, recipe: str | None, parts: Mapping[str, Path]) -> list[str | Path]:
    """Where the parts of the checkpoint are that is read, or was when the bundle was made."""
    from gap_export.api.evaluate import is_bundle
    from gap_export.bundle import open_bundle
    from gap_export.checkpoint.find.source import resolve_model

    # What is wrong with either is said when it is measured.
    with suppress(UsageError):
        if is_bundle(target):
            source = open_bundle(target).manifest.source
            return [*parts.values(), *(part.location for part in source.parts)]
        return list(resolve_model(target, recipe=recipe, parts=parts)[1].parts.values())
    return []


@contextmanager
def _telling_how_to_go_on(terminal: Terminal, records: Path | None) -> Iterator[None]:
    """Say what an interruption leaves."""
    try:
        yield
    except Stopped:
        if records is None:
            terminal.message("the answers so far are lost; --records DIR would have kept them")
        else:
            where = visible(str(records))
            terminal.message(
                f"the answers so far are in {where}; the same command goes on from there"
            )
        raise


def _check_bar(report: EvaluationReport, bar: float) -> None:
    """Hold every GAP row to the bar.

    Raises:
        ParityError: one is below it, or has nothing to be compared with.
    """
    below = [
        f"{row.pruner} at keep {row.keep_ratio:g}: "
        + ("unknown" if row.recovered is None else f"{row.recovered:.3f}")
        for row in report.gap_rows()
        if row.recovered is None or row.recovered < bar
    ]
    if below:
        raise ParityError(
            "GAP recovers less of the unpruned accuracy than asked for",
            seen="; ".join(below),
            allowed=f">= {bar:g}",
        )
