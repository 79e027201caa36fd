"""What ``gap-export check`` found, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gap_export.cli._terminal import format_table
from gap_export.parity.results import BackendResult, CheckReport, LevelResult, TensorRow, number
from gap_export.report.check import (
    backend_title,
    describe_figures,
    facts,
    is_missed,
    tables,
    tensor_rows,
    verdict,
)
from gap_export.report.document import STATUS_WORDS
from gap_export.visible import clean, visible_strings


def describe_check(report: CheckReport) -> str:
    """Of each backend the verdict of its levels, then the details, and in the end the verdict."""
    report = visible_strings(report, show=clean)
    lines = [f"{name}: {value}" for name, value in facts(report)]
    for backend in report.backends:
        lines += ["", *_describe_backend(backend)]
    lines += ["", STATUS_WORDS[verdict(report)]]
    return "\n".join(lines)


def list_failures(report: CheckReport) -> str:
    """Which levels failed, and what was not run that had to be, in one line."""
    report = visible_strings(report, show=clean)
    found = []
    for backend in report.backends:
        failed = [level.level for level in backend.levels if level.status == "failed"]
        if failed:
            found.append(f"{backend_title(backend)}: {', '.join(failed)}")
        if is_missed(report, backend):
            reasons = dict.fromkeys(level.reason for level in backend.levels)
            found.append(f"{backend_title(backend)}: not run: {'; '.join(reasons)}")
    return "; ".join(found)


def _describe_backend(backend: BackendResult) -> Iterator[str]:
    reasons = {level.reason for level in backend.levels}
    if not backend.was_run and len(reasons) == 1:
        yield f"{backend_title(backend)}: not run: {reasons.pop()}"
        return
    yield f"{backend_title(backend)}, {backend.seconds:.1f} s"
    rows = [
        [level.level, STATUS_WORDS[level.status], describe_figures(level)]
        for level in backend.levels
    ]
    yield format_table(["level", "verdict", "what was found"], rows)
    for level in backend.levels:
        if level.reason:
            yield f"{level.level}: {level.reason}"
    for found in backend.divergences:
        yield found.describe()
    for level in backend.levels:
        yield from _describe_rows(level)


def _describe_rows(level: LevelResult) -> Iterator[str]:
    tensors = tensor_rows(level)
    for title, rows in (
        ("how far outputs are from the reference", [row for row in tensors if not row.module]),
        ("how far layers are from the reference", [row for row in tensors if row.module]),
    ):
        if rows:
            yield from ("", f"{level.level}: {title}", _tensor_table(rows))
    for table in () if tensors else tables(level):
        yield from ("", f"{level.level}: {table.title}", format_table(table.header, table.rows))


def _tensor_table(rows: Sequence[TensorRow]) -> str:
    """Fewer columns than in the reports: what fits on a screen."""
    cells = [
        [
            row.component,
            row.tensor,
            *([row.module] if row.module else []),
            str(row.calls),
            *map(number, (row.max_abs_diff, row.mean_abs_diff, row.p99_abs_diff)),
            *map(number, (row.max_abs_reference, row.atol, row.rtol)),
            "ok" if row.passed else "FAILED",
        ]
        for row in rows
    ]
    header = ["component", "tensor", *(["module"] if rows[0].module else []), "calls"]
    header += ["max diff", "mean", "p99", "max value", "atol", "rtol", "verdict"]
    return format_table(header, cells)
