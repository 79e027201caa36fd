"""Data sets that are drawn here, by name: nothing of them is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gap_export.evaluation import refshapes, refshapes2
from gap_export.evaluation.refshapes import AbsentExpression

DrawnName = Literal["refshapes", "refshapes-2"]
AnyScene: TypeAlias = "refshapes.Scene | refshapes2.Scene"


@dataclass(frozen=True, kw_only=True)
class Generator:
    """What draws a data set.

    Attributes:
        scene: From split, seed, index and number of expressions, all by name.
        absent: From one of its scenes and a number to as many expressions of what is not there.
    """

    scene: Callable[..., AnyScene]
    absent: Callable[[Any, int], tuple[AbsentExpression, ...]]


GENERATORS: Mapping[DrawnName, Generator] = {
    "refshapes": Generator(scene=refshapes.generate_scene, absent=refshapes.absent_expressions),
    "refshapes-2": Generator(scene=refshapes2.generate_scene, absent=refshapes2.absent_expressions),
}


def drawn_name(spec: str) -> DrawnName | None:
    """The data set that ``NAME[:SPLIT]`` names; None where none of that name is drawn here."""
    name = spec.partition(":")[0]
    return next((one for one in GENERATORS if one == name), None)
