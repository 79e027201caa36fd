"""A graph beside the reference's modules: values of both, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle import Bundle
from gap_export.errors import UsageError
from gap_export.graph.onnx_file import OnnxFile
from gap_export.parity.compare import largest_of
from gap_export.parity.inside.module_taps import Tap
from gap_export.parity.inside.reference_taps import ReferenceCall, ReferenceTaps
from gap_export.parity.inside.taps import run_taps
from gap_export.parity.replay import Call
from gap_export.spec.tolerances import Tolerance, tolerances_of

# Values that are looked at in one run: those of a large model fill gigabytes.
CHUNK = 16
# Two runs of one operator on one machine: roundings that an optimizer may leave out.
_SAME_OPERATOR = 8.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """One tap, compared.

    Attributes:
        tap: The tap.
        max_abs_diff: How far the graph is off there; infinite where that cannot be said.
        allowed: How far it may be.
    """

    tap: Tap
    max_abs_diff: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether it is no further off than it may be."""
        return self.max_abs_diff <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Search:
    """A graph and what it is compared with.

    Attributes:
        graph: A bundle's base graph.
        replayed: A call of the reference's component.
        tolerance: That of the graph's dtype.
    """

    graph: OnnxFile
    replayed: ReferenceCall
    tolerance: Tolerance

    @classmethod
    def of(
        cls, bundle: Bundle, component: str, call: Call, truth: ReferenceTaps, calls: Sequence[Call]
    ) -> Search:
        """Read a graph and prepare a call; see :func:`gap_export.parity.inside.divergence`.

        Raises:
            UsageError: a decode step without those before it, or a dtype that is not compared.
            BundleError: the graph's file is damaged.
        """
        spec = bundle.manifest.graph(component)
        if spec.dtype != truth.reference.dtype:
            raise UsageError(
                "a graph is looked into beside a reference of its own dtype",
                seen=truth.reference.dtype,
                allowed=spec.dtype,
            )
        return cls(
            graph=OnnxFile.read(bundle.file(spec.file)),
            replayed=truth.replay(component, call, calls),
            # The widest there is for that dtype is what outputs have.
            tolerance=tolerances_of(spec.dtype)["logits"],
        )

    def pairs(self, taps: Sequence[Tap]) -> list[tuple[Tap, NDArray[Any], NDArray[Any]]]:
        """Each tap that the reference has, with its value there and in the graph."""
        given = self.replayed.modules({tap.module for tap in taps if tap.side is not None})
        expected: dict[Tap, NDArray[Any]] = {}
        for tap in taps:
            if tap.side is None:
                expected[tap] = self.replayed.outputs()[tap.value]
                continue
            turns = given.get((tap.module, tap.side), [])
            if tap.turn < len(turns):
                expected[tap] = turns[tap.turn]
        seen = run_taps(self.graph, [tap.value for tap in expected], self.replayed.feed)
        return [(tap, value, seen[tap.value]) for tap, value in expected.items()]

    def tolerance_of(self, expected: NDArray[Any]) -> Tolerance:
        """The tolerance of a value inside the graph: for floats a fraction of the largest.

        Inside a graph there is no telling how small is nothing, so there is no absolute part.
        """
        fraction = self.tolerance.largest_fraction + self.tolerance.rtol
        return Tolerance(
            atol=0.0,
            rtol=0.0,
            largest_fraction=fraction if expected.dtype.kind == "f" else 0.0,
            why="as its dtype's outputs, of the largest value of the tensor",
        )

    def look(self, taps: Sequence[Tap]) -> list[Look]:
        """Compare some taps."""
        return [
            Look(
                tap=tap,
                max_abs_diff=distance_of(expected, seen),
                allowed=self.tolerance_of(expected).absolute(largest_of(expected)),
            )
            for tap, expected, seen in self.pairs(taps)
        ]


def distance_of(expected: NDArray[Any], seen: NDArray[Any]) -> float:
    """Largest difference; infinite where they cannot be compared, of other shapes or not finite."""
    if expected.shape != seen.shape or expected.dtype.kind != seen.dtype.kind:
        return float("inf")
    truth, judged = expected.astype(np.float64), seen.astype(np.float64)
    same = (truth == judged) | (np.isnan(truth) & np.isnan(judged))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(truth - judged))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def rounding_of(expected: NDArray[Any]) -> float:
    """How far two runs of one operator may be apart."""
    if expected.dtype.kind != "f":
        return 0.0
    return _SAME_OPERATOR * float(np.finfo(expected.dtype).eps) * largest_of(expected)
