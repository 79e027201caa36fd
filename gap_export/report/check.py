"""A check as a document: its words and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from gap_export.parity.results import (
    SCHEMA_VERSION,
    BackendResult,
    BoxRow,
    CheckReport,
    LevelResult,
    PositionsRow,
    TensorRow,
    TokenRow,
    number,
)
from gap_export.report.document import (
    STATUS_WORDS,
    Document,
    Figure,
    Section,
    Status,
    Table,
    Tile,
)
from gap_export.report.figures.errors import draw_errors, tolerated
from gap_export.runtime.images.geometry import Box
from gap_export.visible import clean, visible_strings

_BACKENDS: Mapping[str, str] = MappingProxyType(
    {"ort": "ONNX Runtime", "trt": "TensorRT", "openvino": "OpenVINO"}
)
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
# Columns of numbers of a tensor.
_ERRORS: Mapping[str, str] = MappingProxyType(
    {
        "max abs": "max_abs_diff",
        "mean abs": "mean_abs_diff",
        "p99 abs": "p99_abs_diff",
        "max rel": "max_rel_diff",
        "mean rel": "mean_rel_diff",
        "p99 rel": "p99_rel_diff",
    }
)
_BOUNDS: Mapping[str, str] = MappingProxyType(
    {"max value": "max_abs_reference", "atol": "atol", "rtol": "rtol"}
)
# Figures that are no share of anything.
_PLAIN_FIGURES = frozenset({"mean_iou"})


def document_of_check(report: CheckReport) -> Document:
    """What a check found, for people."""
    report = visible_strings(report, show=clean)
    status = verdict(report)
    return Document(
        command="check",
        title=STATUS_WORDS[status],
        status=status,
        tiles=tuple(
            Tile(label=backend_title(one), value=STATUS_WORDS[found], status=found)
            for one in report.backends
            for found in [verdict(report, one)]
        ),
        problems_title="What is wrong",
        problems=problems(report),
        facts=facts(report),
        sections=tuple(part for one in report.backends for part in _sections(one)),
        schema_version=SCHEMA_VERSION,
    )


def backend_title(backend: BackendResult) -> str:
    """What ran, or what was to run."""
    return backend.name or _BACKENDS[backend.backend]


def verdict(report: CheckReport, backend: BackendResult | None = None) -> Status:
    """The verdict on a bundle, or on one backend of it."""
    backends = report.backends if backend is None else [backend]
    if not any(one.was_run for one in backends):
        return "not_run"
    failed = any(level.status == "failed" for one in backends for level in one.levels)
    return "failed" if failed or (backend is None and not report.passed) else "passed"


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
            why = next((level.reason for level in backend.levels if level.reason), "")
            word = "required" if backend.backend in report.required else "asked for"
            found.append(f"{title} was {word} and not run: {why}")
        found += [
            f"{title}, {level.level}: {level.reason}"
            for level in backend.levels
            if level.status == "failed"
        ]
        found += [each.describe() for each in backend.divergences]
    return tuple(found)


def facts(report: CheckReport) -> tuple[tuple[str, str], ...]:
    """What was checked, by name."""
    return (
        ("bundle", report.bundle),
        ("model", report.model),
        ("pruner", f"{report.pruner}, {100 * report.keep_ratio:g} % of the tokens kept"),
        ("compared with", report.reference),
        ("questions", f"{report.questions} (seed {report.seed})"),
    )


def describe_figures(level: LevelResult) -> str:
    """What sums a level up, in one line."""
    parts = []
    for name, value in level.figures.items():
        label = _FIGURES.get(name, name.replace("_", " "))
        if value is None:
            shown = "unknown"
        elif isinstance(value, int):
            shown = str(value)
        else:
            shown = f"{value:.3f}" if name in _PLAIN_FIGURES else f"{100 * value:.1f} %"
        parts.append(f"{label}: {shown}")
    return ", ".join(parts)


def tables(level: LevelResult) -> tuple[Table, ...]:
    """A level's details; outputs of graphs and tensors inside them apart."""
    tensors = tensor_rows(level)
    made = [
        Table.of(
            "ids that the rotary embedding reads",
            [row for row in level.rows if isinstance(row, PositionsRow)],
            {
                "call": lambda row: row.call,
                "readers": lambda row: row.readers,
                "first and last id expected": lambda row: f"{row.expected[0]} to {row.expected[1]}",
                "seen": lambda row: f"{row.seen[0]:.17g} to {row.seen[1]:.17g}",
                "verdict": _word,
            },
            failed=lambda row: not row.passed,
        ),
        _tensors("outputs of the graphs", [row for row in tensors if not row.module]),
        _tensors("tensors inside the graphs", [row for row in tensors if row.module], inside=True),
        Table.of(
            "answers that differ",
            [row for row in level.rows if isinstance(row, TokenRow)],
            {
                "expression": lambda row: row.expression,
                "first other token": lambda row: row.step,
                "margin": lambda row: "none" if row.margin is None else f"{row.margin:.3g}",
                "tie": lambda row: "yes" if row.is_tie else "no",
                "reference": lambda row: row.reference,
                "candidate": lambda row: row.candidate,
            },
            failed=lambda row: not row.is_tie,
        ),
        Table.of(
            "boxes that differ",
            [row for row in level.rows if isinstance(row, BoxRow)],
            {
                "expression": lambda row: row.expression,
                "IoU": lambda row: f"{row.iou:.3f}",
                "reference": lambda row: _edges(row.reference),
                "candidate": lambda row: _edges(row.candidate),
            },
        ),
    ]
    return tuple(table for table in made if table.rows)


def tensor_rows(level: LevelResult) -> list[TensorRow]:
    """The rows that are of tensors."""
    return [row for row in level.rows if isinstance(row, TensorRow)]


def _sections(backend: BackendResult) -> list[Section]:
    """A section for the backend, and one for each level that has details."""
    # Levels that were not run for one reason stand together.
    groups: list[tuple[list[str], LevelResult]] = []
    for level in backend.levels:
        last = groups[-1][1] if groups else None
        if last and level.status == last.status == "not_run" and level.reason == last.reason:
            groups[-1][0].append(level.level)
        else:
            groups.append(([level.level], level))
    overview = Table(
        title=f"verdict by level ({backend.seconds:.1f} s)",
        header=("level", "verdict", "details"),
        rows=tuple(
            (
                ", ".join(names),
                STATUS_WORDS[level.status],
                ". ".join(filter(None, (level.reason, describe_figures(level)))),
            )
            for names, level in groups
        ),
        failed=frozenset(n for n, (_, level) in enumerate(groups) if level.status == "failed"),
    )
    divergences = tuple(each.describe() for each in backend.divergences)
    return [
        Section(title=backend_title(backend), tables=(overview,), callouts=divergences),
        *(
            Section(
                title=level.level,
                depth=3,
                status=level.status,
                tables=tables(level),
                figures=_figures(level),
            )
            for level in backend.levels
            if tables(level)
        ),
    ]


def _figures(level: LevelResult) -> tuple[Figure, ...]:
    """A figure of all outputs, and one of the tensors inside each graph."""
    groups: dict[str, list[TensorRow]] = {}
    for row in tensor_rows(level):
        title = f"{row.component}, layer by layer" if row.module else "outputs of the graphs"
        groups.setdefault(title, []).append(row)

    def severity(row: TensorRow) -> float:
        allowed = tolerated(row)
        if allowed > 0:
            return row.max_abs_diff / allowed
        return float("inf") if row.max_abs_diff > 0 else 0.0

    figures = []
    for title, rows in groups.items():
        worst = max(rows, key=severity)
        caption = (
            f"Tensors: {len(rows)}, beyond tolerance: {sum(not row.passed for row in rows)}. "
            f"Nearest to it, or furthest beyond: {worst.tensor}, off by "
            f"{number(worst.max_abs_diff)} of {number(tolerated(worst))} allowed."
        )
        figures.append(Figure(title=title, caption=caption, draw=partial(draw_errors, rows)))
    return tuple(figures)


def _word(row: PositionsRow | TensorRow) -> str:
    if row.passed:
        return "ok"
    # A tensor inside a graph is held to its tolerance at the outputs only.
    inside = isinstance(row, TensorRow) and row.module
    return f"{'beyond tolerance' if inside else STATUS_WORDS['failed']}: {row.reason}"


def _edges(box: Box | None) -> str:
    return "no box" if box is None else ", ".join(f"{value:.1f}" for value in box)


def _tensors(title: str, rows: Sequence[TensorRow], *, inside: bool = False) -> Table:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        names = reasons.setdefault(row.why, [])
        if row.tensor not in names:
            names.append(row.tensor)

    def numbers(names: Mapping[str, str]) -> dict[str, Callable[[TensorRow], str]]:
        def cell(name: str, row: TensorRow) -> str:
            return number(getattr(row, name))

        return {title: partial(cell, name) for title, name in names.items()}

    return Table.of(
        title,
        rows,
        {
            "tensor": lambda row: row.tensor,
            **({"module": lambda row: row.module} if inside else {}),
            "component": lambda row: row.component,
            "verdict": _word,
            "calls": lambda row: row.calls,
            **numbers(_ERRORS),
            "cosine": lambda row: f"{row.cosine:.6f}",
            "NaN/Inf": lambda row: row.num_nonfinite,
            **numbers(_BOUNDS),
        },
        failed=lambda row: not row.passed,
        notes=[
            f"tolerance of {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {why}"
            for why, names in reasons.items()
        ],
        is_long=inside,
    )
