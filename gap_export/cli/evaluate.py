"""``gap-export eval MODEL|BUNDLE``: accuracy unpruned, compact and with GAP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gap_export.cli._engine_options import ExportDtypeOption, split_dtype
from gap_export.cli._options import (
    BACKENDS,
    KEEP_HELP,
    PRUNER_HELP,
    BackendOption,
    BudgetOption,
    CheckpointOption,
    EnginesOption,
    ExtraPositionOption,
    ExtraTokenOption,
    JsonOption,
    OrderOption,
    QuietOption,
    RecipeOption,
    SamplesOption,
    SeedOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._terminal import format_table
from gap_export.errors import ParityError, UsageError

if TYPE_CHECKING:
    from gap_export.evaluation.accuracy import AccuracyRow, EvaluationReport


def evaluate(
    ctx: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|BUNDLE",
            help="A model is exported at every --pruner and --keep; a bundle is taken as it is.",
            show_default=False,
        ),
    ],
    keep: Annotated[
        list[float] | None,
        typer.Option(
            "--keep", metavar="SHARE", help=f"{KEEP_HELP} Repeatable.", show_default=False
        ),
    ] = None,
    pruner: Annotated[
        list[str] | None,
        typer.Option(
            "--pruner",
            metavar="NAME",
            help=f"{PRUNER_HELP} Repeatable, or with commas.",
            show_default=False,
        ),
    ] = None,
    order: OrderOption = None,
    extra_token: ExtraTokenOption = None,
    extra_position: ExtraPositionOption = "last",
    budget: BudgetOption = None,
    seed: SeedOption = 0,
    recipe: RecipeOption = None,
    data: Annotated[
        Literal["refshapes"], typer.Option("--data", help="What to measure on.")
    ] = "refshapes",
    samples: SamplesOption = 500,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="BUNDLE",
            help="Of a BUNDLE: its model exported with --keep 1. [default: made from its weights]",
            show_default=False,
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            metavar="DIR",
            help="Draw the first answer of each row: box, kept tokens, heat map of the scores.",
            show_default=False,
        ),
    ] = None,
    dtype: ExportDtypeOption = None,
    backend: BackendOption = "ort",
    engines: EnginesOption = None,
    min_recovered: Annotated[
        float | None,
        typer.Option(
            "--min-recovered",
            metavar="SHARE",
            min=0.0,
            help="Exit 3 where GAP recovers less than this share (0..1) of the unpruned accuracy.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure Acc@0.5 unpruned, compact and with GAP."""
    from gap_export.evaluation.accuracy import evaluate_bundle, evaluate_model
    from gap_export.pipeline import ExportOptions
    from gap_export.source import parse_parts

    del data  # one value so far, which typer has checked
    terminal = terminal_of(ctx)
    parts = parse_parts(checkpoint or [])
    if _is_bundle(target):
        _refuse(
            "a bundle is pruned already",
            **{"keep": keep, "pruner": pruner, "order": order, "extra-token": extra_token},
            **{"budget": budget, "extra-position": None if extra_position == "last" else 1},
        )
        _refuse("a bundle says that itself", recipe=recipe, dtype=dtype)
        report = evaluate_bundle(
            Path(target),
            baseline=baseline,
            checkpoint=parts,
            seed=seed,
            num_samples=samples,
            pictures=pictures,
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
        graph_dtype, quantization = split_dtype(dtype)
        report = evaluate_model(
            ExportOptions(
                model=target,
                recipe=recipe,
                checkpoint=parts,
                order=order,
                extra_token=extra_token,
                extra_position=extra_position,
                budget=budget,
                dtype=graph_dtype,
                quantization=quantization,
                seed=seed,
            ),
            pruners=_split(pruner or []),
            keep_ratios=keep or (),
            num_samples=samples,
            pictures=pictures,
            progress=terminal.progress(),
        )
    if as_json:
        terminal.json(report.to_plain())
    else:
        terminal.result(_describe(report))
    if min_recovered is not None:
        _check_bar(report, min_recovered)


def _is_bundle(target: str) -> bool:
    from gap_export.manifest import MANIFEST_NAME

    return (Path(target) / MANIFEST_NAME).exists()


def _refuse(why: str, **options: object) -> None:
    """An option that would be ignored is an error.

    Raises:
        UsageError: one was given.
    """
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} cannot be used here: {why}")


def _split(names: list[str]) -> list[str]:
    """``["a,b", "c"]`` as ``["a", "b", "c"]``, each once."""
    parts = [part.strip() for name in names for part in name.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def _describe(report: EvaluationReport) -> str:
    first = report.rows[0]
    header = [
        "pruner",
        "keep",
        "tokens",
        "positions",
        "Acc@0.5 %",
        "95 % interval",
        "recovered %",
        "IoU %",
    ]
    return "\n".join(
        [
            f"{first.model} on RefShapes, held-out, seed {first.seed}: "
            f"{first.n} expressions, {first.num_images} pictures",
            "",
            format_table(header, [_table_row(row) for row in report.rows]),
        ]
    )


def _table_row(row: AccuracyRow) -> list[str]:
    low, high = row.ci95
    return [
        row.pruner,
        f"{row.keep_ratio:g}",
        f"{row.mean_visual_tokens:.1f}".removesuffix(".0"),
        row.positions,
        f"{100 * row.acc_at_50:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        "-" if row.recovered is None else f"{100 * row.recovered:.1f}",
        f"{100 * row.mean_iou:.1f}",
    ]


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
