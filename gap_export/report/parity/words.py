"""What the reports for people have in common: words, numbers, and tables of text.

All text is plain here; each format escapes it in its own way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gap_export.parity.results import (
    BackendResult,
    BoxRow,
    CheckReport,
    LevelResult,
    PositionsRow,
    TensorRow,
    TokenRow,
    number,
)
from gap_export.runtime.geometry import Box
from gap_export.visible import clean

STATUS_WORDS: Mapping[str, str] = MappingProxyType(
    {"passed": "passed", "failed": "FAILED", "not_run": "not run"}
)
_BACKENDS: Mapping[str, str] = MappingProxyType({"ort": "ONNX Runtime", "trt": "TensorRT"})
_FIGURES: Mapping[str, str] = MappingProxyType(
    {
        "equal": "the same",
        "mean_iou": "mean IoU",
        "share_over_95": "IoU over 0.95",
        "reference_acc_at_50": "Acc@0.5 of the reference",
        "candidate_acc_at_50": "Acc@0.5 of the bundle",
        "difference_low": "at least (95 %)",
        "difference_high": "at most (95 %)",
    }
)
# Figures that are no share of anything.
_PLAIN_FIGURES = frozenset({"mean_iou"})


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: As many cells each.
        bad: Indices of the rows that are not as they should be.
        notes: Lines below it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bad: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


def backend_title(backend: BackendResult) -> str:
    """What ran, or what was to."""
    return clean(backend.name) or _BACKENDS[backend.backend]


def verdict(report: CheckReport) -> str:
    """``passed``, ``FAILED``, or ``not run`` where nothing was."""
    if not any(backend.was_run for backend in report.backends):
        return STATUS_WORDS["not_run"]
    return STATUS_WORDS["passed" if report.passed else "failed"]


def is_missed(report: CheckReport, backend: BackendResult) -> bool:
    """Whether a backend was not run that had to be, or was the only hope of a verdict."""
    nothing = not any(each.was_run for each in report.backends)
    return not backend.was_run and (nothing or backend.backend in report.required)


def problems(report: CheckReport) -> tuple[str, ...]:
    """Why the verdict is no better, a sentence each."""
    found = []
    for backend in report.backends:
        title = backend_title(backend)
        if is_missed(report, backend):
            why = next((clean(level.reason) for level in backend.levels if level.reason), "")
            word = "required" if backend.backend in report.required else "asked for"
            found.append(f"{title} was {word} and not run: {why}")
        found += [
            f"{title}, {level.level}: {clean(level.reason)}"
            for level in backend.levels
            if level.status == "failed"
        ]
        found += [each.describe() for each in backend.divergences]
    return tuple(found)


def facts(report: CheckReport) -> tuple[tuple[str, str], ...]:
    """What was checked, by name."""
    return (
        ("bundle", clean(report.bundle)),
        ("model", clean(report.model)),
        ("pruner", f"{clean(report.pruner)}, {100 * report.keep_ratio:g} % of the tokens kept"),
        ("compared with", clean(report.reference)),
        ("questions", f"{report.questions} (seed {report.seed})"),
    )


def describe_figures(level: LevelResult) -> str:
    """What sums a level up, in one line."""
    parts = []
    for name, value in level.figures.items():
        label = _FIGURES.get(name, clean(name).replace("_", " "))
        if value is None:
            shown = "unknown"
        elif isinstance(value, int):
            shown = str(value)
        elif name in _PLAIN_FIGURES:
            shown = f"{value:.3f}"
        else:
            shown = f"{100 * value:.1f} %"
        parts.append(f"{label}: {shown}")
    return ", ".join(parts)


def overview(backend: BackendResult) -> tuple[tuple[tuple[str, ...], LevelResult], ...]:
    """Levels in order; those that were not run for one reason together, with one of them."""
    groups: list[tuple[list[str], LevelResult]] = []
    for level in backend.levels:
        last = groups[-1][1] if groups else None
        if last and level.status == last.status == "not_run" and level.reason == last.reason:
            groups[-1][0].append(level.level)
        else:
            groups.append(([level.level], level))
    return tuple((tuple(names), level) for names, level in groups)


def tables(level: LevelResult) -> tuple[Table, ...]:
    """A level's details; outputs of graphs and tensors inside them apart."""
    made = [
        _positions([row for row in level.rows if isinstance(row, PositionsRow)]),
        _tensors("outputs of the graphs", [r for r in tensor_rows(level) if not r.module]),
        _tensors("tensors inside the graphs", [r for r in tensor_rows(level) if r.module]),
        _tokens([row for row in level.rows if isinstance(row, TokenRow)]),
        _boxes([row for row in level.rows if isinstance(row, BoxRow)]),
    ]
    return tuple(table for table in made if table.rows)


def tensor_rows(level: LevelResult) -> list[TensorRow]:
    """Rows of tensors."""
    return [row for row in level.rows if isinstance(row, TensorRow)]


def _bad(rows: Sequence[PositionsRow | TensorRow]) -> frozenset[int]:
    return frozenset(index for index, row in enumerate(rows) if not row.passed)


def _word(row: PositionsRow | TensorRow) -> str:
    if row.passed:
        return "ok"
    # What is off inside a graph is held to its tolerance at the outputs only.
    inside = isinstance(row, TensorRow) and row.module
    return f"{'beyond tolerance' if inside else STATUS_WORDS['failed']}: {clean(row.reason)}"


def _positions(rows: Sequence[PositionsRow]) -> Table:
    return Table(
        title="ids that the rotary embedding reads",
        header=("call", "readers", "first and last id there must be", "seen", "verdict"),
        rows=tuple(
            (
                clean(row.call),
                str(row.readers),
                f"{row.expected[0]} to {row.expected[1]}",
                f"{row.seen[0]:.17g} to {row.seen[1]:.17g}",
                _word(row),
            )
            for row in rows
        ),
        bad=_bad(rows),
    )


def _tensors(title: str, rows: Sequence[TensorRow]) -> Table:
    inside = any(row.module for row in rows)
    return Table(
        title=title,
        header=(
            "component",
            "tensor",
            *(["module"] if inside else []),
            *("verdict", "calls", "max abs", "mean abs", "p99 abs", "max rel", "mean rel"),
            *("p99 rel", "cosine", "NaN/Inf", "max value", "atol", "rtol"),
        ),
        rows=tuple(
            (
                clean(row.component),
                clean(row.tensor),
                *([clean(row.module)] if inside else []),
                _word(row),
                str(row.calls),
                *map(number, (row.max_abs_diff, row.mean_abs_diff, row.p99_abs_diff)),
                *map(number, (row.max_rel_diff, row.mean_rel_diff, row.p99_rel_diff)),
                f"{row.cosine:.6f}",
                str(row.num_nonfinite),
                *map(number, (row.max_abs_reference, row.atol, row.rtol)),
            )
            for row in rows
        ),
        bad=_bad(rows),
        notes=tuple(_reasons_for_tolerances(rows)),
    )


def _reasons_for_tolerances(rows: Iterable[TensorRow]) -> Iterable[str]:
    """Each once, with the tensors it is of."""
    named: dict[str, list[str]] = {}
    for row in rows:
        names = named.setdefault(clean(row.why), [])
        if clean(row.tensor) not in names:
            names.append(clean(row.tensor))
    for why, names in named.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"tolerance of {', '.join(names[:3])}{more}: {why}"


def _tokens(rows: Sequence[TokenRow]) -> Table:
    return Table(
        title="answers that differ",
        header=("expression", "first other token", "margin", "tie", "reference", "candidate"),
        rows=tuple(
            (
                clean(row.expression),
                str(row.step),
                "none" if row.margin is None else f"{row.margin:.3g}",
                "yes" if row.is_tie else "no",
                clean(row.reference),
                clean(row.candidate),
            )
            for row in rows
        ),
        bad=frozenset(index for index, row in enumerate(rows) if not row.is_tie),
    )


def _boxes(rows: Sequence[BoxRow]) -> Table:
    return Table(
        title="boxes that differ",
        header=("expression", "IoU", "reference", "candidate"),
        rows=tuple(
            (clean(row.expression), f"{row.iou:.3f}", _box(row.reference), _box(row.candidate))
            for row in rows
        ),
    )


def _box(box: Box | None) -> str:
    return "no box" if box is None else ", ".join(f"{value:.1f}" for value in box)
