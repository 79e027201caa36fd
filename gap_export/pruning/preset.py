"""A published method as named choices: who survives, in which order, with which extra token."""

from __future__ import annotations

from dataclasses import dataclass

from gap_export.pruning.pruner import Pruner, ScoringPruner
from gap_export.spec.manifest import Budget, ExtraToken, LongTexts, Order, PrunerText


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What ``--pruner NAME`` means; order, extra token, budget and text may be chosen otherwise.

    Attributes:
        name: What the command line and the manifest call it.
        pruner: Who survives.
        order: As published.
        extra_token: As published.
        budget: As published: ``adaptive`` where the image decides how many survive.
        pruner_text: As published: what the text tower reads, of a pruner that reads the text.
        long_texts: As published: what becomes of a text that is too long for the tower.
        paper: Where it is from.
    """

    name: str
    pruner: Pruner
    order: Order = "raster"
    extra_token: ExtraToken = "none"
    budget: Budget = "fixed"
    pruner_text: PrunerText = "expression"
    long_texts: LongTexts = "cut"
    paper: str = ""

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Numbers it can keep: an image can decide only by scores that have outliers."""
        adaptive = self.budget == "adaptive" and isinstance(self.pruner, ScoringPruner)
        return ("fixed", "adaptive") if adaptive else ("fixed",)
