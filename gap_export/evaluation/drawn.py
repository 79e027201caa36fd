"""Data sets that are drawn here, by name: nothing of them is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from gap_export.evaluation import refshapes, refshapes2

DrawnName = Literal["refshapes", "refshapes-2"]
AnyScene: TypeAlias = "refshapes.Scene | refshapes2.Scene"

GENERATORS: Mapping[DrawnName, Callable[..., AnyScene]] = {
    "refshapes": refshapes.generate_scene,
    "refshapes-2": refshapes2.generate_scene,
}


def drawn_name(spec: str) -> DrawnName | None:
    """The data set that ``NAME[:SPLIT]`` names; None where none of that name is drawn here."""
    name = spec.partition(":")[0]
    return next((one for one in GENERATORS if one == name), None)
