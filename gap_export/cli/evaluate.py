"""``gap-export eval MODEL|BUNDLE``: accuracy unpruned, compact and with GAP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli._check_options import HtmlOption, MarkdownOption, ReportJsonOption
from gap_export.cli._evaluate_options import (
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
    parse_misaligned,
    split_names,
)
from gap_export.cli._options import (
    BACKENDS,
    BackendOption,
    CheckpointOption,
    EnginesOption,
    JsonOption,
    QuietOption,
    RecipeOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._outputs import ForceOption, output_rule, with_sources
from gap_export.cli._requests import Only, takes_requests
from gap_export.errors import ParityError, UsageError
from gap_export.spec.requests import PruningRequest, WeightsRequest
from gap_export.stop_signals import Stopped
from gap_export.visible import visible

if TYPE_CHECKING:
    from gap_export.cli._terminal import Terminal
    from gap_export.evaluation.results import EvaluationReport


# The other options of a pruning are repeatable here, or measured both ways.
_CHOICES = ("order", "extra_token", "extra_position", "budget", "pruner_text", "seed")


@takes_requests
def evaluate(
    ctx: typer.Context,
    target: TargetArgument,
    pruning: Annotated[PruningRequest, Only(_CHOICES)],
    weights: Annotated[WeightsRequest, Only(("dtype",))],
    keep: KeepsOption = None,
    pruner: PrunersOption = None,
    misaligned: MisalignedOption = None,
    recipe: RecipeOption = None,
    data: DataOption = "refshapes",
    samples: EvaluateSamplesOption = None,
    protocol: ProtocolOption = "native",
    prompt: PromptOption = None,
    baseline: BaselineOption = None,
    checkpoint: CheckpointOption = None,
    backend: BackendOption = "ort",
    engines: EnginesOption = None,
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
    from gap_export.checkpoint.find.source import parse_parts
    from gap_export.evaluation.evaluate import Asking, evaluate_bundle, evaluate_model
    from gap_export.exporting import ExportOptions
    from gap_export.report import check_writable, write_reports

    parts = parse_parts(checkpoint or [])
    bundles = _bundles(target, baseline)
    rule = output_rule(
        force=force,
        inputs={"MODEL": [target], "--data": [data], "--checkpoint": checkpoint or []},
        outside=bundles,
    )
    for option, folder in {"--records": records, "--pictures": pictures}.items():
        if folder is not None:
            rule.check_outside(option, folder)
    rule = with_sources(rule, _sources(target, recipe, parts))
    check_writable(json=report_json, markdown=markdown, html=html, rule=rule)
    reports = {"--report-json": report_json, "--markdown": markdown, "--html": html}
    check_beside_folders(reports, records=records, pictures=pictures)
    asking = Asking(
        data=data,
        protocol=protocol,
        prompt=prompt,
        misaligned=parse_misaligned(misaligned or []),
        records=records,
        workers=workers,
        pictures=pictures,
        rule=rule,
    )
    if _is_bundle(target):
        _refuse(
            "a bundle is pruned already",
            keep=keep,
            pruner=pruner,
            **{name.replace("_", "-"): getattr(pruning, name) for name in _CHOICES[:-1]},
        )
        _refuse("a bundle says that itself", recipe=recipe, dtype=weights.dtype)
        if BACKENDS[backend] == "onnxruntime":
            _refuse("it is for --backend trt", engines=engines)
        if baseline is not None:
            _refuse("with --baseline no checkpoint is read", checkpoint=checkpoint or None)
        with _telling_how_to_go_on(terminal, records):
            report = evaluate_bundle(
                Path(target),
                baseline=baseline,
                checkpoint=parts,
                seed=pruning.seed,
                num_samples=samples,
                asking=asking,
                backend=BACKENDS[backend],
                engines=engines,
                progress=terminal.progress(),
            )
    else:
        _refuse("it is for a BUNDLE", baseline=baseline, engines=engines)
        if BACKENDS[backend] != "onnxruntime":
            _refuse(
                "a MODEL is measured in ONNX Runtime; export it and name the BUNDLE",
                backend=backend,
            )
        dtype, quantization = weights.resolve()
        with _telling_how_to_go_on(terminal, records):
            report = evaluate_model(
                ExportOptions(
                    model=target,
                    pruning=pruning,
                    recipe=recipe,
                    checkpoint=parts,
                    dtype=dtype,
                    quantization=quantization,
                ),
                prunings=pruning.variants(split_names("--pruner", pruner or []), keep or ()),
                num_samples=samples,
                asking=asking,
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


def _bundles(target: str, baseline: Path | None) -> dict[str, Path]:
    """Those that nothing may be written into, by what they are."""
    found = {"the bundle": Path(target)} if _is_bundle(target) else {}
    return found if baseline is None else {**found, "the baseline": baseline}


def _sources(target: str, recipe: str | None, parts: Mapping[str, Path]) -> list[str | Path]:
    """Where the parts of the checkpoint are that is read, or was when the bundle was made."""
    from gap_export.bundle import open_bundle
    from gap_export.checkpoint.find.source import resolve_model

    # What is wrong with either is said when it is measured.
    with suppress(UsageError):
        if _is_bundle(target):
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


def _is_bundle(target: str) -> bool:
    from gap_export.bundle.drafts import find_standing
    from gap_export.spec.manifest import MANIFEST_NAME

    try:
        return (find_standing(Path(target).absolute()) / MANIFEST_NAME).exists()
    except (OSError, ValueError):
        # No name of a file.
        return False


def _refuse(why: str, **options: object) -> None:
    """An option that would be ignored is an error.

    Raises:
        UsageError: one was given.
    """
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} cannot be used here: {why}")


def _check_bar(report: EvaluationReport, bar: float) -> None:
    """Hold every GAP row to the bar.

    Raises:
        ParityError: one is below it, or has nothing to be compared with.
    """
    below = [
        f"{row.pruner} at keep {row.keep_ratio:g}: "
        + ("unknown" if row.recovered is None else f"{row.recovered:.3f}")
        for row in report.rows
        if row.positions == "gap" and (row.recovered is None or row.recovered < bar)
    ]
    if below:
        raise ParityError(
            "GAP recovers less of the unpruned accuracy than asked for",
            seen="; ".join(below),
            allowed=f">= {bar:g}",
        )
