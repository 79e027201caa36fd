"""What a model is: a recipe names a family, where the weights are, and every fact the job needs.

A recipe is ``models/<name>/recipe.yaml``; a new model of a known family is a new recipe and no
code.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from gap_export.errors import RecipeError, UnknownModelError
from gap_export.spec.architecture import (
    Architecture,
    TextShape,
)
from gap_export.spec.family import other_families
from gap_export.spec.manifest import (
    BoxSpec,
    GridSpec,
    ImageSpec,
    PromptSpec,
)
from gap_export.spec.manifest.facts import SLOT, wrong_facts
from gap_export.spec.manifest.sizes import image_sizes, prompt_sizes
from gap_export.spec.recipe_base import with_base
from gap_export.spec.recipe_sizes import MAX_TOKEN_ID, check_in_range, check_sizes
from gap_export.spec.strict_yaml import read_yaml

RECIPE_NAME = "recipe.yaml"

_MAX_SHOWN = 300
# Shorter, since all names that there are stand beside it.
_MAX_NAME_SHOWN = 150
HUB_ID = r"^[\w-][\w.-]*/[\w-][\w.-]*$"
# A name becomes part of a folder's name, and must not lead out of the current folder.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HubRepository(_Strict):
    """A repository of the Hugging Face hub."""

    id: str = Field(pattern=HUB_ID)
    kind: Literal["model", "space"] = "model"
    revision: str = "main"


class CheckpointPart(_Strict):
    """One thing that must be on disk.

    Attributes:
        what: A few words, e.g. ``the original LLaMA-7B``.
        hub: Where it is published; None where it is not on the hub.
        also: Other repositories that do, e.g. with the same weights in another layout.
        url: Where else to get it.
        file: The one file of the part where it is a file and no folder.
        required: False where only some layouts, or some pruners, need it; ``published`` where the
            main part as published does, while one of the user's own may be whole.
    """

    what: str
    hub: HubRepository | None = None
    also: tuple[HubRepository, ...] = ()
    url: str | None = None
    file: Name | None = None
    required: bool | Literal["published"] = True

    @property
    def repositories(self) -> tuple[HubRepository, ...]:
        """All that will do, best first."""
        return (*((self.hub,) if self.hub is not None else ()), *self.also)


class CheckpointSource(_Strict):
    """Where a recipe's weights come from.

    Attributes:
        kind: ``bundled``: beside the recipe; ``local``: on the user's disk.
        parts: By role; ``main`` is the one that a MODEL folder names. Empty where bundled.
    """

    kind: Literal["bundled", "local"]
    parts: Mapping[Name, CheckpointPart] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _parts_fit_the_kind(self) -> CheckpointSource:
        if (self.kind == "local") != ("main" in self.parts):
            raise ValueError("parts, with one called main, where kind is local, and only there")
        return self


class TextTower(_Strict):
    """The CLIP text tower of a model, for pruners that read the text.

    Attributes:
        role: Part of the checkpoint that holds it.
        folder: Within that part.
        template: Holds ``{expression}`` once.
        similarity_sign: -1 where patch-text similarity is inverted (OpenAI CLIP), else +1.
        shape: Its sizes; None where its config.json alone says them.
    """

    role: Name = "main"
    folder: str = "."
    template: str = SLOT
    similarity_sign: Literal[-1, 1]
    shape: TextShape | None = None

    @model_validator(mode="after")
    def _folder_and_template_are_sensible(self) -> TextTower:
        path = PurePosixPath(self.folder)
        if path.is_absolute() or ".." in path.parts or "\0" in self.folder:
            raise ValueError(
                "text_tower.folder must be a relative path within the checkpoint's folder"
            )
        if self.template.count(SLOT) != 1:
            raise ValueError(f"text_tower.template must hold {SLOT!r} exactly once")
        return self


class PruningDefaults(_Strict):
    """What ``gap-export MODEL`` uses unless the user says otherwise."""

    pruner: str
    keep_ratio: float = Field(gt=0, le=1)


class PublishedFigure(_Strict):
    """An accuracy that was published for this model, with its source and protocol.

    Attributes:
        dataset: E.g. ``RefCOCO``.
        split: Split of the dataset.
        positions: ``none`` where no token was dropped; ``compact`` or ``gap`` where some were.
        acc_at_50: 0..1.
        protocol: How an answer was judged, in words.
        source: Where it stands.
    """

    dataset: str
    split: str
    positions: Literal["none", "compact", "gap"] = "none"
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
        license: SPDX id of the license of the weights.
        license_note: What one must know of it before one uses the model, if anything.
        checkpoint: Where the weights come from.
        architecture: Its sizes; None where the checkpoint's config.json alone says them.
        special_tokens: Ids of the tokens with a meaning, by their text; what a checkpoint says
            must agree.
        end_of_answer: Texts of the special tokens that end an answer; empty where the checkpoint's
            config says them.
        select_layer: Index into the vision tower's hidden states; -2 is the last but one.
        grid: Visual tokens before pruning.
        image: Image preparation.
        prompt: Prompt template and limits.
        box: Answer syntax and frame.
        text_tower: None where the model has none.
        defaults: Pruner and keep ratio used when none is given.
        published: Published figures, with their source.
    """

    name: Name
    aliases: tuple[Name, ...] = ()
    family: str
    summary: str
    license: str
    license_note: str | None = None
    checkpoint: CheckpointSource
    architecture: Architecture | None = None
    special_tokens: Mapping[str, int] = Field(default_factory=dict)
    end_of_answer: tuple[str, ...] = ()
    select_layer: int
    grid: GridSpec
    image: ImageSpec
    prompt: PromptSpec
    box: BoxSpec
    text_tower: TextTower | None
    defaults: PruningDefaults
    published: tuple[PublishedFigure, ...] = ()

    @model_validator(mode="after")
    def _facts_make_sense(self) -> Recipe:
        for name, seen, allowed in wrong_facts(self.grid, self.image, self.prompt, self.box):
            raise ValueError(f"{name} must be {allowed}; seen: {reprlib.repr(seen)}")
        return self

    @model_validator(mode="after")
    def _prompt_holds_its_slots(self) -> Recipe:
        slot = self.prompt.image_token
        if self.prompt.template.count(slot) != 1:
            raise ValueError(f"prompt.template must hold {slot!r} exactly once")
        if self.prompt.template.rstrip().endswith(self.prompt.image_token):
            raise ValueError("prompt.template must go on after the image")
        if self.prompt.template.replace(self.prompt.image_token, "").count(SLOT) != 1:
            raise ValueError(f"prompt.image_token must not be part of {SLOT!r}")
        if self.prompt.question is not None and self.prompt.question_template() is None:
            raise ValueError(
                "prompt.question must be found in prompt.template: start, the expression, end, and "
                "the image, which holds prompt.image_token"
            )
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Recipe:
        unknown = [text for text in self.end_of_answer if text not in self.special_tokens]
        if unknown:
            raise ValueError(f"end_of_answer must name special_tokens; {unknown} are none")
        for text, token in self.special_tokens.items():
            check_in_range(f"special_tokens of {text!r}", token, 0, MAX_TOKEN_ID)
        roles = tuple(self.checkpoint.parts) or ("main",)
        if self.text_tower is not None and self.text_tower.role not in roles:
            raise ValueError(f"text_tower.role must be one of {', '.join(roles)}")
        return self

    @model_validator(mode="after")
    def _sizes_fit_together(self) -> Recipe:
        sizes = [*image_sizes(self.image, self.grid)]
        if self.architecture is not None:
            width = self.architecture.decoder.embeds_size
            sizes += prompt_sizes(self.image, self.grid, self.prompt, width)
        for name, seen, most in sizes:
            check_in_range(f"{name} ({seen})", seen, 1, most)
        if self.architecture is not None:
            check_sizes(self.architecture, self.image, self.grid)
        return self


@lru_cache(maxsize=1)
def models_dir() -> Path:
    """The folder of recipes: package data in a wheel, ``models/`` in a checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "_models"
    return packaged if packaged.is_dir() else package.parent / "models"


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file.

    It may have a base, see :mod:`gap_export.spec.recipe_base`.

    Raises:
        RecipeError: unreadable, too large, not YAML, a base that is not there or has one itself, or
            a key or value that is not allowed.
    """
    shipped = {home.parent.name: home for home in models_dir().glob(f"*/{RECIPE_NAME}")}
    plain = with_base(read_yaml(path), path, shipped)
    try:
        return Recipe.model_validate(plain)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value = first.get("input")
        raise RecipeError(
            f"recipe {path} is not valid" + (f" at {where[:_MAX_SHOWN]}" if where else ""),
            # Facts that contradict each other are named in the message; all of them are too many.
            seen=None if isinstance(value, dict) else reprlib.repr(value),
            allowed=str(first["msg"]).removeprefix("Value error, ")[:_MAX_SHOWN],
        ) from err


def list_recipes() -> list[tuple[Recipe, Path]]:
    """Every recipe with its folder: those shipped, by name, then those of other packages."""
    found = _other_recipes().items()
    usable = [(one, folder) for folder, one in found if isinstance(one, Recipe)]
    return [*_recipes_in(models_dir()), *usable]


def broken_recipes() -> list[RecipeError]:
    """Why recipes of other packages cannot be used."""
    return [one for one in _other_recipes().values() if isinstance(one, RecipeError)]


def _recipes_in(folder: Path) -> list[tuple[Recipe, Path]]:
    homes = sorted(file.parent for file in folder.glob(f"*/{RECIPE_NAME}"))
    return [(load_recipe(home / RECIPE_NAME), home) for home in homes]


def _other_recipes() -> dict[Path, Recipe | RecipeError]:
    """By folder, recipes that come with other packages' families, or what is wrong with them."""
    found: dict[Path, Recipe | RecipeError] = {}
    folders = [family.recipes for family in other_families() if family.recipes is not None]
    homes = [file.parent for folder in folders for file in sorted(folder.glob(f"*/{RECIPE_NAME}"))]
    taken = {name for recipe, _ in _recipes_in(models_dir()) for name in _names(recipe)}
    for home in homes:
        try:
            found[home] = recipe = load_recipe(home / RECIPE_NAME)
        except RecipeError as err:
            found[home] = err
            continue
        clash = taken.intersection(_names(recipe))
        if clash:
            found[home] = RecipeError(
                f"recipe {home / RECIPE_NAME} has a name that is taken",
                seen=", ".join(sorted(clash)),
                fix="rename it, or uninstall the package that it comes with",
            )
        taken.update(_names(recipe))
    return found


def _names(recipe: Recipe) -> tuple[str, ...]:
    return (recipe.name, *recipe.aliases)


def find_recipe(name: str) -> tuple[Recipe, Path]:
    """The recipe of that name or alias, and its folder.

    Raises:
        UnknownModelError: there is none; the nearest names are suggested.
    """
    known: dict[str, tuple[Recipe, Path]] = {}
    for recipe, folder in list_recipes():
        for key in _names(recipe):
            known[key] = (recipe, folder)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name[:_MAX_NAME_SHOWN], known, n=3, cutoff=0.4)
    raise UnknownModelError(
        "no model of that name",
        seen=name[:_MAX_NAME_SHOWN],
        allowed=", ".join(sorted(known)) + ", the hub id of one, or a checkpoint folder",
        fix=f"did you mean {' or '.join(near)}?" if near else "see: gap-export models",
    )
