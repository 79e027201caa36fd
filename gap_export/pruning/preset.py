"""A published method as named choices: who survives, in which order, with which extra token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from gap_export.errors import GapExportError
from gap_export.pruning.pruner import (
    TEXT_READINGS,
    ChoosingPruner,
    FixedPruner,
    Pruner,
    Reading,
    ScoringPruner,
)
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
        pruner_text: As published: what is read of the text, by a pruner that reads it.
        long_texts: As published: what becomes of a text that is too long for what reads it.
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


def check_preset(preset: Preset, where: str) -> None:
    """Refuse values that no manifest may hold, and pruners that are none.

    Args:
        preset: As another package made it.
        where: The preset, for the message.

    Raises:
        GapExportError: with the field, the value seen and what is allowed.
    """
    pruner = preset.pruner
    kinds = (ScoringPruner, ChoosingPruner, FixedPruner)
    if not isinstance(pruner, kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise GapExportError(
            f"{where} has no pruner", seen=repr(pruner), allowed=f"an object of {names}"
        )
    if not isinstance(getattr(pruner, "summary", None), str):
        raise GapExportError(f"{where} has no summary", fix='give its class one: summary = "..."')
    if not isinstance(pruner.reads, frozenset):
        raise GapExportError(
            f"{where}: reads is no frozenset", seen=repr(pruner.reads), allowed="frozenset({...})"
        )
    _check(where, "reads", pruner.reads, get_args(Reading))
    if pruner.reads >= TEXT_READINGS:
        raise GapExportError(
            f"{where}: reads names two spaces of the text",
            seen=", ".join(sorted(TEXT_READINGS)),
            allowed="one of them",
        )
    _check(where, "orders", pruner.orders, get_args(Order))
    _check(where, "extra_tokens", pruner.extra_tokens, get_args(ExtraToken))
    _check(where, "order", [preset.order], pruner.orders)
    _check(where, "extra_token", [preset.extra_token], pruner.extra_tokens)
    # Checked by itself first: ``budgets`` follows from it.
    _check(where, "budget", [preset.budget], get_args(Budget))
    _check(where, "budget", [preset.budget], preset.budgets)
    _check(where, "pruner_text", [preset.pruner_text], get_args(PrunerText))
    _check(where, "long_texts", [preset.long_texts], get_args(LongTexts))


def _check(where: str, field: str, seen: Iterable[str], allowed: Iterable[str]) -> None:
    strange = [repr(value) for value in seen if value not in tuple(allowed)]
    if strange:
        raise GapExportError(
            f"{where}: {field} is not what it may be",
            seen=", ".join(strange),
            allowed=", ".join(allowed),
        )
