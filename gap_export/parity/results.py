"""What a check found: levels of one backend each, as plain data that reports are written from.

Shares are 0..1, differences have the unit of the tensor they are of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gap_export.visible import clean

Level = Literal["positions", "tensor", "token", "box", "task"]
# From what is computed to what it is good for.
LEVELS: tuple[Level, ...] = ("positions", "tensor", "token", "box", "task")
Status = Literal["passed", "failed", "not_run"]
BackendKey = Literal["ort", "trt", "openvino"]

SCHEMA = "gap-export-check"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PositionsRow:
    """The ids of one call, as the graph's rotary embedding reads them.

    Attributes:
        call: ``prefill``, or ``decode 1``, ``decode 2``, ...
        readers: How many places of the graph turn ids into angles.
        expected: First and last id there must be.
        seen: First and last id of the reader that is furthest off.
        passed: Every reader sees exactly the ids there must be.
        reason: Where and what the first difference is; empty if there is none.
    """

    call: str
    readers: int
    expected: tuple[int, int]
    seen: tuple[float, float]
    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor over all calls: a graph's output or, asked for by layer, one inside.

    Attributes:
        component: The graph it comes from, or ``newline``.
        tensor: Its name; of the decoder followed by ``(prefill)`` or ``(decode)``.
        module: Which module of the model gives it; empty of an output.
        calls: How often it was compared.
        max_abs_diff: See :class:`gap_export.parity.compare.Differences`, as for all up to
            ``num_nonfinite``; infinite where the two cannot be compared.
        max_abs_reference: Largest value of the reference.
        atol: Tolerance used, its share of the largest value included.
        rtol: Tolerance used.
        why: Where that tolerance is from.
        passed: Every call was within tolerance.
        reason: The first failure, in words.
        ties: Calls excluded in part because of a rounding tie in the choice of kept tokens.
    """

    component: str
    tensor: str
    module: str = ""
    calls: int
    max_abs_diff: float
    mean_abs_diff: float
    p99_abs_diff: float
    max_rel_diff: float
    mean_rel_diff: float
    p99_rel_diff: float
    cosine: float
    num_nonfinite: int
    max_abs_reference: float
    atol: float
    rtol: float
    why: str
    passed: bool
    reason: str
    ties: int = 0


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first tensor of a graph that is not what it should be.

    Attributes:
        component: The graph.
        call: ``prefill``, ``decode 1``, or the name of another component's call.
        tensor: Its name.
        operator: What computes it.
        node: The node's name.
        module: The module of the model it belongs to.
        max_abs_diff: How far it is off; of an overflow the largest number, in float32.
        allowed: How far it may be; of an overflow the largest number of the dtype.
        last_agreeing: The last tensor before it that is right; empty if it is the first of all.
        cause: What is wrong there, in words, as far as that is known.
        kind: ``differs`` from the reference, or ``overflows`` its dtype, as the reference may, too.
    """

    component: str
    call: str
    tensor: str
    operator: str
    node: str
    module: str
    max_abs_diff: float
    allowed: float
    last_agreeing: str
    cause: str = ""
    kind: Literal["differs", "overflows"] = "differs"

    def describe(self) -> str:
        """Where a graph goes wrong, in a sentence or two."""
        where = f"{clean(self.component)} ({clean(self.call)})"
        what = f"{clean(self.operator)} {clean(self.node)}".strip()
        module = f" of module {clean(self.module)}" if self.module else ""
        if self.kind == "overflows":
            text = (
                f"{where} first overflows in {what or 'an input'}{module}"
                f"{f', which gives {clean(self.tensor)}' if self.tensor else ''}: "
                f"{self.max_abs_diff:.4g} in float32, "
                f"where {self.allowed:.5g} is the largest number."
            )
            return f"{text} {clean(self.cause)}".rstrip()
        text = (
            f"{where} first diverges at {clean(self.tensor)}, which {what or 'an input'}{module} "
            f"gives: off by {number(self.max_abs_diff)}, allowed {number(self.allowed)}."
        )
        if self.last_agreeing:
            text += f" {clean(self.last_agreeing)} before it still agrees."
        else:
            text += " It is the first tensor of all that were looked at."
        return f"{text} {clean(self.cause)}".rstrip()


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A question whose tokens are not those of the reference.

    Attributes:
        expression: What was asked.
        step: The first token that differs, counted from 1.
        margin: By how much the reference preferred its own token there, in logits; None where one
            answer went on and the other had ended, or there is no answer.
        is_tie: Whether rounding decides there: the reference's two logits are no further apart than
            two logits may be off, or the two saw other visual tokens, as few as is allowed.
        reference: Its answer.
        candidate: Its answer, or why there is none.
    """

    expression: str
    step: int
    margin: float | None
    is_tie: bool
    reference: str
    candidate: str


@dataclass(frozen=True, kw_only=True)
class BoxRow:
    """A question whose boxes are not the same.

    Attributes:
        expression: What was asked.
        iou: Intersection over union of the two boxes; 0 where one of them has none.
        reference: Its box (left, top, right, bottom) in pixels of the image, None if it has none.
        candidate: Its box, likewise.
    """

    expression: str
    iou: float
    reference: tuple[float, float, float, float] | None
    candidate: tuple[float, float, float, float] | None


Row = PositionsRow | TensorRow | Divergence | TokenRow | BoxRow


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """One level of one backend.

    Attributes:
        level: Which.
        status: ``not_run`` where it could not be; see ``reason``.
        reason: Why it failed or was not run, in one sentence; where it passed what should be known
            of it, as a rule nothing.
        figures: What sums it up, by name, e.g. ``questions``, ``equal``, ``ties``.
        rows: Its details; of ``token`` and ``box`` only the first few that differ.
    """

    level: Level
    status: Status
    reason: str = ""
    figures: Mapping[str, float | int | None] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BackendResult:
    """What was found of one backend.

    Attributes:
        backend: As the command line has it.
        name: What ran, with its version; empty where it did not.
        seconds: Wall time.
        levels: In the order of :data:`LEVELS`, those that were asked for.
        divergences: For each graph whose outputs are off, where that begins.
    """

    backend: BackendKey
    name: str
    seconds: float
    levels: tuple[LevelResult, ...]
    divergences: tuple[Divergence, ...] = ()

    @property
    def was_run(self) -> bool:
        """Whether any level was."""
        return any(level.status != "not_run" for level in self.levels)


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """The verdict on a bundle.

    Attributes:
        bundle: Its folder.
        model: Recipe name.
        pruner: Its name.
        keep_ratio: In (0, 1].
        reference: What it was compared with: PyTorch and with whose weights, or a golden.
        questions: How many were asked of both sides.
        seed: Seed of the samples.
        backends: In the order they were asked for.
        required: Backends that must have been run.
    """

    bundle: str
    model: str
    pruner: str
    keep_ratio: float
    reference: str
    questions: int
    seed: int
    backends: tuple[BackendResult, ...]
    required: tuple[BackendKey, ...] = ()

    @property
    def passed(self) -> bool:
        """No level failed, something was run, and so was every backend that must be."""
        levels = [level for backend in self.backends for level in backend.levels]
        run = {backend.backend for backend in self.backends if backend.was_run}
        return (
            all(level.status != "failed" for level in levels)
            and bool(run)
            and set(self.required) <= run
        )

    def to_plain(self) -> dict[str, Any]:
        """JSON form; a number that is not finite becomes null."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            **plain_values(asdict(self)),
        }


def plain_values(value: Any) -> Any:
    """What JSON can say of a value made by ``asdict``; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: float | None) -> str:
    """An error or a value, two digits of it."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return "0" if value == 0 else f"{value:.1e}"
