"""What is known of a family of models before PyTorch is imported, and where other packages' are.

A package adds a family by an entry point of the group ``gap_export.families`` whose name is the
family's and whose object is a :class:`Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gap_export.errors import GapExportError
from gap_export.plugins import Plugins

# Before the name of a family's package, among the tools that a bundle was made with.
FAMILY_MARK = "family: "


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family: models that one code reads from checkpoints and builds.

    Attributes:
        name: What recipes call it.
        builder: ``module:NAME`` of its :class:`gap_export.families.common.builder.ModelBuilder`,
            which is imported when a model is built.
        readings: What a pruner may read from its towers, see :data:`gap_export.pruning.Reading`;
            ``text`` and ``next_layer`` only where a recipe has them as well.
        protocol: The evaluation protocol of its authors' own program; None where they publish none.
        preparations: Ways to prepare an image that it brings, by the name that recipes use:
            ``module:NAME`` of a :class:`gap_export.runtime.images.preparations.Preparation`. That
            module is imported on devices, so it imports no PyTorch.
        recipes: Folder of its models, ``NAME/recipe.yaml`` each; None where there are none, or
            they are this package's.
        any_canvas: Whether its towers take images of any size, in whole visual tokens; a bundle is
            made for one, which the recipe declares.
    """

    name: str
    builder: str
    readings: frozenset[str]
    protocol: str | None = None
    preparations: Mapping[str, str] = field(default_factory=dict)
    recipes: Path | None = None
    any_canvas: bool = False


def _check(name: str, thing: object, where: str) -> Family:
    if not isinstance(thing, Family) or thing.name != name:
        raise GapExportError(
            f"{where} is not a family of that name",
            seen=thing,
            allowed=f"gap_export.families.Family(name={name!r}, ...)",
        )
    return thing


OTHER_FAMILIES: Plugins[Family] = Plugins(group="gap_export.families", kind="family", check=_check)


def other_families() -> tuple[Family, ...]:
    """Families of other packages that can be used."""
    return tuple(one for one in OTHER_FAMILIES.found.values() if isinstance(one, Family))
