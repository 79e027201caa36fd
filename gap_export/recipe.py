"""What a model is: a recipe names a family, where the weights are, and every fact the job needs.

A recipe is ``models/<name>/recipe.yaml``; a new model of a known family is a new recipe and no
code.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gap_export.errors import RecipeError, UnknownModelError
from gap_export.manifest import (
    BoxSpec,
    GridSpec,
    ImageSpec,
    PromptSpec,
)

RECIPE_NAME = "recipe.yaml"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CheckpointSource(_Strict):
    """Where a recipe's weights come from.

    Attributes:
        kind: ``bundled``: beside the recipe; ``folder``: the user names it.
    """

    kind: Literal["bundled", "folder"]


class TextTower(_Strict):
    """The CLIP text tower of a model, for pruners that read the text.

    Attributes:
        folder: Within the checkpoint folder.
        template: Holds ``{expression}`` once.
        similarity_sign: -1 where patch-text similarity is inverted (OpenAI CLIP), else +1.
    """

    folder: str
    template: str = "{expression}"
    similarity_sign: Literal[-1, 1]


class PruningDefaults(_Strict):
    """What ``gap-export MODEL`` uses when not told otherwise."""

    pruner: str
    keep_ratio: float = Field(gt=0, le=1)


class PublishedFigure(_Strict):
    """An accuracy somebody published for this model, with its source and protocol."""

    dataset: str
    split: str
    acc_at_50: float = Field(ge=0, le=1)
    protocol: str
    source: str


class Recipe(_Strict):
    """Everything about one model that is data.

    Attributes:
        name: Also the folder's name.
        aliases: Other names it answers to.
        family: Key of the registry in ``gap_export.families``.
        summary: One line for ``gap-export models``.
        license: SPDX id of the weights' licence.
        checkpoint: Where the weights come from.
        select_layer: Index into the vision tower's hidden states; -2 is the last but one.
        grid: Visual tokens before pruning.
        image: Picture preparation.
        prompt: Prompt template and limits.
        box: Answer syntax and frame.
        text_tower: None where the model has none.
        defaults: Pruner and keep ratio used when none is given.
        published: Figures of others, with their source.
    """

    name: str
    aliases: tuple[str, ...] = ()
    family: str
    summary: str
    license: str
    checkpoint: CheckpointSource
    select_layer: int
    grid: GridSpec
    image: ImageSpec
    prompt: PromptSpec
    box: BoxSpec
    text_tower: TextTower | None
    defaults: PruningDefaults
    published: tuple[PublishedFigure, ...] = ()

    @model_validator(mode="after")
    def _prompt_holds_its_slots(self) -> Recipe:
        for slot in ("{expression}", self.prompt.image_token):
            if self.prompt.template.count(slot) != 1:
                raise ValueError(f"prompt.template must hold {slot!r} exactly once")
        if self.prompt.template.rstrip().endswith(self.prompt.image_token):
            raise ValueError("prompt.template must go on after the image")
        return self


@lru_cache(maxsize=1)
def models_dir() -> Path:
    """The folder of recipes: package data in a wheel, ``models/`` in a checkout."""
    packaged = Path(__file__).parent / "_models"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "models"


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file.

    Raises:
        RecipeError: unreadable, not YAML, or a key or value that is not allowed.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise RecipeError("recipe cannot be read", seen=f"{path}: {err}") from err
    try:
        return Recipe.model_validate(plain)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise RecipeError(
            f"recipe {path} is not valid at {where}",
            seen=repr(first.get("input"))[:120],
            allowed=str(first["msg"]),
        ) from err


def list_recipes() -> list[tuple[Recipe, Path]]:
    """Every shipped recipe with its folder, by name."""
    folders = sorted(p.parent for p in models_dir().glob(f"*/{RECIPE_NAME}"))
    return [(load_recipe(folder / RECIPE_NAME), folder) for folder in folders]


def find_recipe(name: str) -> tuple[Recipe, Path]:
    """The recipe of that name or alias, and its folder.

    Raises:
        UnknownModelError: there is none; the nearest names are suggested.
    """
    known: dict[str, tuple[Recipe, Path]] = {}
    for recipe, folder in list_recipes():
        for key in (recipe.name, *recipe.aliases):
            known[key] = (recipe, folder)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise UnknownModelError(
        "no model of that name",
        seen=name,
        allowed=", ".join(sorted(known)) + ", or a checkpoint folder",
        fix=f"did you mean {' or '.join(near)}?" if near else "see: gap-export models",
    )
