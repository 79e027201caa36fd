"""What a plan says, as plain data that reports are written from.

Times are milliseconds, memory is bytes, shares are 0..1. The names of the fields are the keys of
the JSON form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gap_export.parity.results import plain_values
from gap_export.version import __version__

SCHEMA = "gap-export-plan"
SCHEMA_VERSION = 1
TOWER, PREFILL, DECODE = "tower", "prefill", "decode"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number that is not known exactly.

    Attributes:
        low: Least.
        likely: What it is compared with a budget by.
        high: Most.
        basis: What it rests on.
    """

    low: float
    likely: float
    high: float
    basis: str = ""

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            low=self.low + other.low, likely=self.likely + other.likely, high=self.high + other.high
        )

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(low=self.low * factor, likely=self.likely * factor, high=self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What was measured of a model with this pruning.

    Attributes:
        acc_at_50: Share of boxes with IoU of at least 0.5.
        interval: 95 %.
        n: Questions.
    """

    acc_at_50: float
    interval: tuple[float, float]
    n: int


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to export the model, and what is to be expected of it.

    Attributes:
        keep_ratio: Share of visual tokens that is kept.
        pruner: By what.
        dtype: As ``--dtype`` has it.
        canvas: Width and height of the image in pixels.
        prompt_tokens: Tokens of a prompt.
        visual_tokens: Of those, visual ones.
        multiply_adds: By stage; ``decode`` is one token.
        times: Milliseconds by stage; ``decode`` is one token, ``total`` an answer.
        memory: Bytes by part, and ``total``.
        accuracy: Where it was measured.
        fits: Whether the device holds it.
        meets: Whether it meets the budgets, too.
        on_front: Whether no other is at least as good in all of time, memory and accuracy.
        command: A line that exports it.
    """

    keep_ratio: float
    pruner: str
    dtype: str
    canvas: tuple[int, int]
    prompt_tokens: int
    visual_tokens: int
    multiply_adds: Mapping[str, int]
    times: Mapping[str, Estimate]
    memory: Mapping[str, Estimate]
    accuracy: Accuracy | None
    fits: bool
    meets: bool
    on_front: bool
    command: str

    @property
    def latency_ms(self) -> Estimate:
        """Of an answer."""
        return self.times["total"]

    @property
    def memory_bytes(self) -> Estimate:
        """In all."""
        return self.memory["total"]


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What fits a device, and how fast.

    Attributes:
        model: Its name.
        device: Name of the device.
        device_facts: What of it was used, and where that stands.
        answer_tokens: Tokens of an answer.
        text_tokens: Tokens of a prompt beside the visual ones.
        latency_ms: Budget; None where none was given.
        memory_bytes: What the model may take: the budget, else what the device has.
        configurations: All that were looked at.
        chosen: Place of the one to export, or None where nothing meets the budget.
        largest: Place of what comes nearest where nothing does.
        notes: What the figures leave out, and what to mind.
    """

    model: str
    device: str
    device_facts: Mapping[str, Any]
    answer_tokens: int
    text_tokens: int
    latency_ms: float | None
    memory_bytes: float
    configurations: tuple[Configuration, ...]
    chosen: int | None
    largest: int | None
    notes: tuple[str, ...] = field(default=())

    @property
    def best(self) -> Configuration | None:
        """The one to export."""
        return None if self.chosen is None else self.configurations[self.chosen]

    @property
    def nearest(self) -> Configuration | None:
        """What comes nearest to the budget where nothing meets it."""
        return None if self.largest is None else self.configurations[self.largest]

    def to_plain(self) -> dict[str, Any]:
        """The report as JSON data."""
        head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "gap_export": __version__}
        plain: dict[str, Any] = plain_values({**head, **asdict(self)})
        return plain
