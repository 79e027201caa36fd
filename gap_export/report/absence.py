"""The table of an evaluation about objects that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gap_export.evaluation.absence import Absence, Interval
from gap_export.evaluation.results import SettingRow
from gap_export.report.document import Table
from gap_export.report.panels import names_of


def tabulate_absence(rows: Sequence[SettingRow]) -> Table:
    """How well the score of an answer tells whether the object is there."""
    found = [(row, row.absence) for row in rows if row.absence is not None]
    kinds = names_of(absence.auroc_by_kind for _, absence in found)

    def of_kind(kind: str, pair: tuple[SettingRow, Absence]) -> str:
        return f"{pair[1].auroc_by_kind[kind]:.3f}" if kind in pair[1].auroc_by_kind else ""

    def rate(share: float, interval: Interval) -> str:
        low, high = (100 * end for end in interval)
        return f"{100 * share:.1f} % ({low:.1f} to {high:.1f})"

    return Table.of(
        "the probability of the box as score of an answer",
        found,
        {
            "setting": lambda pair: pair[0].name,
            "AUROC": lambda pair: f"{pair[1].auroc:.3f}",
            "AUROC, 95 % interval": lambda pair: "{:.3f} to {:.3f}".format(*pair[1].auroc_ci95),
            **{f"AUROC, {kind}": partial(of_kind, kind) for kind in kinds},
            "false boxes at 95 % recall": lambda pair: rate(
                pair[1].false_box_rate, pair[1].false_box_ci95
            ),
            "recall reached": lambda pair: f"{100 * pair[1].recall:.1f} %",
            "threshold": lambda pair: f"{pair[1].threshold:.3g}",
            "calibration error": lambda pair: f"{pair[1].calibration_error:.3f}",
            "a box for what is not there": lambda pair: (
                f"{pair[1].num_boxes} of {pair[1].num_absent}"
            ),
            "objects that are there": lambda pair: pair[1].num_present,
        },
        notes=[
            "AUROC: the probability that an object that is there has a higher score than one that "
            "is not; 0.5 tells nothing. False boxes: the share of absent objects whose box has a "
            "score at which 95 % of the objects that are there are found. Intervals: bootstrap "
            "over images. Calibration error: of the score read as the probability that the "
            "object is there, 10 bins."
        ],
    )
