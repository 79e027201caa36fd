"""What a model is: a recipe names a family, where the weights are, and every fact the job needs.

A recipe is ``models/<name>/recipe.yaml``; a new model of a known family is a new recipe and no
code.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from gap_export.errors import RecipeError, UnknownModelError
from gap_export.manifest import (
    BoxSpec,
    GridSpec,
    ImageSpec,
    PromptSpec,
)

RECIPE_NAME = "recipe.yaml"

# A recipe is a page of text; what is larger is something else.
_MAX_BYTES = 64 * 1024
_MAX_SHOWN = 300
_MAX_TOKENS = 100_000
_MAX_GRID_SIDE = 4096
_MAX_IMAGE_SIDE = 1 << 14
_SLOT = "{expression}"
# A name becomes part of a folder's name, and must not lead out of the current folder.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


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
    template: str = _SLOT
    similarity_sign: Literal[-1, 1]

    @field_validator("folder")
    @classmethod
    def _folder_stays_within(cls, folder: str) -> str:
        path = PurePosixPath(folder)
        if path.is_absolute() or ".." in path.parts or "\0" in folder:
            raise ValueError("a relative path within the checkpoint's folder")
        return folder

    @field_validator("template")
    @classmethod
    def _template_holds_its_slot(cls, template: str) -> str:
        if template.count(_SLOT) != 1:
            raise ValueError(f"must hold {_SLOT!r} exactly once")
        return template


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

    name: Name
    aliases: tuple[Name, ...] = ()
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

    # The specs are plain dataclasses that a device reads without pydantic, so their ranges are
    # checked here.
    @field_validator("grid")
    @classmethod
    def _grid_in_range(cls, grid: GridSpec) -> GridSpec:
        _in_range("rows", grid.rows, 1, _MAX_GRID_SIDE)
        _in_range("cols", grid.cols, 1, _MAX_GRID_SIDE)
        return grid

    @field_validator("image")
    @classmethod
    def _image_in_range(cls, image: ImageSpec) -> ImageSpec:
        _in_range("height", image.height, 1, _MAX_IMAGE_SIDE)
        _in_range("width", image.width, 1, _MAX_IMAGE_SIDE)
        for value in image.pad_color:
            _in_range("pad_color", value, 0, 255)
        if not all(math.isfinite(value) for value in image.mean):
            raise ValueError("mean must be finite")
        if not all(math.isfinite(value) and value > 0 for value in image.std):
            raise ValueError("std must be finite and above 0")
        return image

    @field_validator("prompt")
    @classmethod
    def _prompt_in_range(cls, prompt: PromptSpec) -> PromptSpec:
        _in_range("max_expression_tokens", prompt.max_expression_tokens, 1, _MAX_TOKENS)
        _in_range("max_new_tokens", prompt.max_new_tokens, 1, _MAX_TOKENS)
        return prompt

    @field_validator("box")
    @classmethod
    def _box_in_range(cls, box: BoxSpec) -> BoxSpec:
        if not (math.isfinite(box.scale) and box.scale > 0):
            raise ValueError("scale must be finite and above 0")
        return box

    @model_validator(mode="after")
    def _prompt_holds_its_slots(self) -> Recipe:
        for slot in (_SLOT, self.prompt.image_token):
            if self.prompt.template.count(slot) != 1:
                raise ValueError(f"prompt.template must hold {slot!r} exactly once")
        if self.prompt.template.rstrip().endswith(self.prompt.image_token):
            raise ValueError("prompt.template must go on after the image")
        return self


def _in_range(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{key} must lie in {low}..{high}")


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few of them can stand for more data than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Read one node, refusing a reference to another."""
        if self.check_event(yaml.AliasEvent):
            events: Any = self  # the stubs leave this method without types
            mark = events.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)


@lru_cache(maxsize=1)
def models_dir() -> Path:
    """The folder of recipes: package data in a wheel, ``models/`` in a checkout."""
    packaged = Path(__file__).parent / "_models"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "models"


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file.

    Raises:
        RecipeError: unreadable, too large, not YAML, or a key or value that is not allowed.
    """
    plain = _read_yaml(path)
    try:
        return Recipe.model_validate(plain)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise RecipeError(
            f"recipe {path} is not valid at {where[:_MAX_SHOWN]}",
            seen=reprlib.repr(first.get("input")),
            allowed=str(first["msg"])[:_MAX_SHOWN],
        ) from err


def _read_yaml(path: Path) -> Any:
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise RecipeError(
                "recipe is too large",
                seen=f"{path}: more than {_MAX_BYTES} bytes",
                allowed=f"{_MAX_BYTES} bytes",
            )
        return yaml.load(raw.decode("utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (
        *(OSError, yaml.YAMLError, RecursionError),
        # PyYAML lets these out where a value is not what its tag says, e.g. the date 2024-13-45.
        *(ValueError, LookupError, TypeError, AttributeError, OverflowError),
    ) as err:
        reason = f"{path}: {err}"[:_MAX_SHOWN]
        raise RecipeError("recipe cannot be read", seen=reason) from err


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
    near = difflib.get_close_matches(name[:_MAX_SHOWN], known, n=3, cutoff=0.4)
    raise UnknownModelError(
        "no model of that name",
        seen=name[:_MAX_SHOWN],
        allowed=", ".join(sorted(known)) + ", or a checkpoint folder",
        fix=f"did you mean {' or '.join(near)}?" if near else "see: gap-export models",
    )
