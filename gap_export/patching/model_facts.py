"""What an export's config.json and preprocessor_config.json say, and which recipe fits it.

Only what a bundle needs is read; what a config leaves out is left open, not guessed.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.errors import CheckpointError, UsageError
from gap_export.spec.recipe import RECIPE_NAME, Recipe, find_recipe, list_recipes, load_recipe

CONFIG, PREPROCESSOR, GENERATION = (
    "config.json", "preprocessor_config.json", "generation_config.json",
)  # fmt: skip
# A config is a few pages of text.
_MAX_BYTES = 4 << 20
# Configs write means and deviations with fewer digits than recipes, or more.
_SAME = 1e-4


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts of an export; None where they do not say.

    Attributes:
        model_type: What config.json calls the model.
        num_visual_tokens: Visual tokens of one image, by the config's image and patch size.
        image_size: Side of the square that the vision encoder reads, in pixels.
        has_tiles: Whether images are cut into tiles.
        patch_size: Side of a patch in pixels.
        frames_per_patch: Frames of a video that are one patch; a still image is repeated.
        patches_per_side: Patches along a side of what becomes one visual token.
        image_token_id: Id of the token that stands for the image.
        eos_token_ids: Tokens that end an answer.
        mean: Mean of each channel, in 0..1.
        std: Deviation of each channel, in 0..1.
    """

    model_type: str | None = None
    num_visual_tokens: int | None
    image_size: int | None
    has_tiles: bool
    patch_size: int | None = None
    frames_per_patch: int | None = None
    patches_per_side: int | None = None
    image_token_id: int | None
    max_position_embeddings: int | None
    vocab_size: int | None
    hidden_size: int | None
    eos_token_ids: tuple[int, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read_facts(folder: Path) -> ModelFacts:
    """Read an export's configs.

    Raises:
        UsageError: no config.json, or one that is damaged or of wrong types.
    """
    config = _read_json(folder / CONFIG, required=True)
    vision = _section(config, "vision_config", folder)
    # Qwen2-VL's first configs have no section for the decoder: they are flat.
    is_flat = "text_config" not in config and "hidden_size" in config
    text = config if is_flat else _section(config, "text_config", folder)
    generation = _read_json(folder / GENERATION, required=False)
    preprocessor = _read_json(folder / PREPROCESSOR, required=False)
    image_size, patch = _size(vision, "image_size"), _size(vision, "patch_size")
    side = image_size // patch if image_size is not None and patch is not None else None
    token = _size(config, "image_token_index", "image_token_id", low=0)
    eos = generation.get("eos_token_id", text.get("eos_token_id", config.get("eos_token_id")))
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(each) is int and each >= 0 for each in listed):
        raise _wrong("eos_token_id", eos, "ids, 0 or more")
    kind = config.get("model_type")
    return ModelFacts(
        model_type=kind if isinstance(kind, str) else None,
        num_visual_tokens=None if side is None else side * side,
        image_size=image_size,
        has_tiles=bool(config.get("image_grid_pinpoints")),
        patch_size=patch,
        frames_per_patch=_size(vision, "temporal_patch_size"),
        patches_per_side=_size(vision, "spatial_merge_size"),
        image_token_id=token,
        max_position_embeddings=_size(text, "max_position_embeddings"),
        vocab_size=_size(text, "vocab_size"),
        hidden_size=_size(text, "hidden_size"),
        eos_token_ids=tuple(listed),
        mean=_channels(preprocessor, "image_mean"),
        std=_channels(preprocessor, "image_std"),
    )


def choose_recipe(
    folder: Path, facts: ModelFacts, sizes: Mapping[str, int], *, name: str | None
) -> Recipe:
    """The recipe that says how an export's model is asked: prompt, image, answer.

    Args:
        folder: The export's; a recipe.yaml in it comes first where none is named.
        facts: From :func:`read_facts`.
        sizes: From the graphs: ``hidden_size``, ``num_layers``, ``num_key_value_heads``,
            ``head_dim``.
        name: A shipped recipe; None to find the one that fits.

    Raises:
        UsageError: none fits, or several do.
        UnknownModelError: no recipe of that name.
        RecipeError: recipe.yaml is not valid.
    """
    own = folder / RECIPE_NAME
    if name is not None or own.is_file():
        recipe = find_recipe(name)[0] if name is not None else load_recipe(own)
        wrong = _misfits(recipe, facts, sizes)
        if wrong:
            raise UsageError(
                f"the export does not fit recipe {recipe.name}",
                seen="; ".join(f"{what} {seen}" for what, seen, _ in wrong),
                allowed="; ".join(f"{what} {wanted}" for what, _, wanted in wrong),
                fix="name the recipe of its model: --recipe NAME (names: gap-export models)",
            )
        return recipe
    fitting = [each for each, _ in list_recipes() if not _misfits(each, facts, sizes)]
    # Models of several families have decoders of one size: then the config's own word counts.
    named = [each for each in fitting if each.family == facts.model_type]
    fitting = named or fitting
    if len(fitting) == 1:
        return fitting[0]
    raise UsageError(
        "the sizes do not show which model this is",
        seen=", ".join(each.name for each in fitting) or "no recipe of these sizes",
        fix="say which: --recipe NAME (names: gap-export models)"
        if fitting
        else f"write a {RECIPE_NAME} for it, and put it beside its {CONFIG}",
    )


def _misfits(
    recipe: Recipe, facts: ModelFacts, sizes: Mapping[str, int]
) -> list[tuple[str, object, object]]:
    """(what, seen, wanted) of all in which an export is not what a recipe says."""
    image = recipe.image
    pairs: list[tuple[str, object, object]] = [
        ("visual tokens", facts.num_visual_tokens, recipe.grid.num_visual_tokens),
        ("image height", facts.image_size, image.height),
        ("image width", facts.image_size, image.width),
        ("tiles", facts.has_tiles, False),
    ]
    if image.tiles is not None:
        pairs.append(("images", "whole", "cut into tiles, which is not patched"))
    if recipe.architecture is not None:
        decoder = recipe.architecture.decoder
        pairs += [(key, size, getattr(decoder, key)) for key, size in sizes.items()]
    found = [pair for pair in pairs if pair[1] is not None and pair[1] != pair[2]]
    for what, seen, wanted in (
        ("image_mean", facts.mean, image.mean),
        ("image_std", facts.std, image.std),
    ):
        if seen is not None and any(
            abs(one - other) > _SAME for one, other in zip(seen, wanted, strict=True)
        ):
            found.append((what, list(seen), list(wanted)))
    return found


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if not required:
            return {}
        raise CheckpointError(
            f"the export has no {path.name}",
            seen=path.parent,
            fix="get the export again, with all of its files",
        )
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        plain = json.loads(raw) if len(raw) <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError("not JSON", seen=f"{path}: {err}"[:300]) from err
    if not isinstance(plain, dict):
        raise CheckpointError(
            "not a config", seen=path, allowed=f"a JSON object of at most {_MAX_BYTES} bytes"
        )
    return plain


def _section(config: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    section = config.get(key)
    if not isinstance(section, dict):
        raise CheckpointError(
            f"{folder / CONFIG} has no {key}",
            seen=reprlib.repr(section),
            allowed="the config of a vision-language model, with vision_config and text_config",
        )
    return section


def _size(section: dict[str, Any], *keys: str, low: int = 1) -> int | None:
    for key in keys:
        value = section.get(key)
        if value is not None:
            if type(value) is not int or value < low:
                raise _wrong(key, value, f"a whole number, {low} or more")
            return value
    return None


def _channels(section: dict[str, Any], key: str) -> tuple[float, ...] | None:
    value = section.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or [type(each) in (int, float) for each in value] != [True] * 3:
        raise _wrong(key, value, "three numbers")
    return tuple(map(float, value))


def _wrong(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"the export's configs: {key} is not a sensible value",
        seen=reprlib.repr(value),
        allowed=allowed,
    )
