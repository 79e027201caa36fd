"""LLaVA checkpoints as their authors publish them, e.g. liuhaotian/llava-v1.5-7b.

The language model and the projector are in one folder, whose config.json is a Llama's or a
Mistral's with ``mm_*`` keys. The vision tower is in there only where it was trained as well
(LLaVA-1.6); else it is OpenAI's own, a part of its own: ``tower``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MistralConfig

from gap_export.checkpoint.find.hub_cache import ADAPTER_CONFIG
from gap_export.checkpoint.find.source import MAIN, Checkpoint
from gap_export.checkpoint.tokenizers.tokenizer_json import has_tokenizer, read_tokenizer
from gap_export.checkpoint.weights import Weight, read_json_object
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.configs import (
    check_architecture,
    compare_facts,
    decoder_shape,
    eos_token_ids,
)
from gap_export.families.common.checkpoints.limits import require
from gap_export.families.common.checkpoints.lora import with_adapter
from gap_export.families.common.checkpoints.matching import (
    KeyLayout,
    build_config,
    main_dtype,
    match_tensors,
    peek_config,
)
from gap_export.families.common.checkpoints.parts import has_weights, index_folder, read_clip_tower
from gap_export.families.common.modules.expected import NEWLINE_KEY, expected_clip_tower
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.spec.architecture import Architecture, DecoderShape, ProjectorShape, VisionShape
from gap_export.spec.manifest import TilesSpec
from gap_export.spec.recipe import Recipe

TOWER = "tower"
# What was trained beside the adapters to a language model, which are another layout.
TRAINED_FILE = "non_lora_trainables.bin"
KEYS = KeyLayout(
    prefixes=(
        ("model.mm_projector.0.", "projector.linear_1."),
        ("model.mm_projector.2.", "projector.linear_2."),
        ("model.vision_tower.vision_tower.vision_model.", "tower."),
        ("model.vision_tower.vision_tower.", "tower."),
        ("model.image_newline", NEWLINE_KEY),
        ("model.", "decoder."),
    ),
    ignored_suffixes=(".rotary_emb.inv_freq", ".embeddings.position_ids"),
)
_DECODERS: Mapping[str, type[LlamaConfig | MistralConfig]] = {
    "llava": LlamaConfig,
    "llava_llama": LlamaConfig,
    "llava_mistral": MistralConfig,
}
_PROJECTOR = "mlp2x_gelu"
_UNPAD, _FLAT = "spatial_unpad", "flat"


@dataclass(frozen=True, kw_only=True)
class LlavaOriginalLayout:
    """One folder with everything but, for LLaVA-1.5, the vision tower.

    A tower in the folder is the model's own and goes before the part ``tower``, whose config.json
    still says its sizes where the recipe does not.

    Attributes:
        newline: Whether the family has tiles, and the vector that ends their rows.
    """

    name: str
    newline: bool = False

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """By the keys of config.json: transformers' own LLaVA calls itself ``llava`` as well."""
        folder = checkpoint.main
        return is_original(folder, newline=self.newline) and not is_adapter(folder)

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        folder = checkpoint.main
        found = index_folder(folder)
        config = read_original_config(recipe, folder, num_tensors=len(found), newline=self.newline)
        source = assemble_original(
            recipe,
            checkpoint,
            config,
            found,
            expected,
            layout=self.name,
            files=[(MAIN, file) for file in sorted({ref.file for ref in found.values()})],
            tokenizers=[folder],
        )
        return with_adapter(source, folder, KEYS)


@dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """A config.json with ``mm_*`` keys, checked against the recipe.

    Attributes:
        file: Where it is.
        plain: All of it.
        language: Its other keys, as the language model's config.
        decoder: Sizes of the language model.
        newline: Whether images are cut into tiles.
    """

    file: Path
    plain: Mapping[str, Any]
    language: Any
    decoder: DecoderShape
    newline: bool


def is_original(folder: Path, *, newline: bool) -> bool:
    """Whether a folder's config.json is an original LLaVA's.

    Args:
        folder: Any path.
        newline: Whether it has to be one that cuts images into tiles, or one that does not.
    """
    plain = peek_config(folder)
    ours = str(plain.get("model_type")).startswith("llava") and "mm_vision_tower" in plain
    tiled = str(plain.get("mm_patch_merge_type", _FLAT)) != _FLAT
    return ours and "vision_config" not in plain and tiled == newline


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters to a language model that is elsewhere."""
    apart = (folder / TRAINED_FILE).is_file() or not has_weights(folder)
    return (folder / ADAPTER_CONFIG).is_file() and apart


def read_original_config(
    recipe: Recipe, folder: Path, *, num_tensors: int, newline: bool
) -> OriginalConfig:
    """Read a config.json with ``mm_*`` keys.

    Args:
        recipe: What it must fit.
        folder: Holds it.
        num_tensors: Number of tensors there are; the config may not claim more layers.
        newline: Whether the family cuts images into tiles.

    Raises:
        CheckpointError: missing, damaged, of a model that is not implemented, or not the recipe's.
    """
    file = folder / "config.json"
    plain = read_json_object(file)
    kind = plain.get("model_type")
    require(kind in _DECODERS, "model_type", kind, ", ".join(_DECODERS), where=file)
    cls = _DECODERS[str(kind)]
    language = build_config(
        cls, {**plain, "model_type": cls.model_type}, file, num_tensors=num_tensors
    )
    facts: list[tuple[str, Any, Any]] = [
        ("mm_projector_type", plain.get("mm_projector_type"), _PROJECTOR),
        ("mm_vision_select_layer", plain.get("mm_vision_select_layer"), recipe.select_layer),
        ("mm_vision_select_feature", plain.get("mm_vision_select_feature", "patch"), "patch"),
        ("mm_use_im_start_end", plain.get("mm_use_im_start_end", False), False),
        ("mm_patch_merge_type", plain.get("mm_patch_merge_type", _FLAT),
         _UNPAD if newline else _FLAT),
    ]  # fmt: skip
    if "image_aspect_ratio" in plain:
        facts.append(("image_aspect_ratio", plain["image_aspect_ratio"], recipe.image.preparation))
    if newline and recipe.image.tiles is not None:
        wanted = sorted([list(size) for size in recipe.image.tiles.resolutions])
        seen = _resolutions(plain)
        facts.append(
            ("image_grid_pinpoints", sorted(seen) if isinstance(seen, list) else seen, wanted)
        )
    compare_facts(recipe, folder, facts)
    return OriginalConfig(
        file=file,
        plain=plain,
        language=language,
        decoder=decoder_shape(language, file),
        newline=newline,
    )


def assemble_original(
    recipe: Recipe,
    checkpoint: Checkpoint,
    config: OriginalConfig,
    found: Mapping[str, Weight],
    expected: Expected,
    *,
    layout: str,
    files: Sequence[tuple[str, Path]],
    tokenizers: Sequence[Path],
) -> ModelSource:
    """Match what was found with what the config says, the vision tower from where it is.

    Args:
        recipe: What the model is.
        checkpoint: Its parts.
        config: The main part's.
        found: All weights but those of a tower elsewhere, by original names or by ours.
        expected: Shapes of all tensors of a model.
        layout: Name of the layout.
        files: Files that ``found`` was read from, with their part.
        tokenizers: Folders where the tokenizer may be; the first that has one gives it.

    Raises:
        CheckpointError: a tensor or part is missing or left over, or does not fit the recipe.
    """
    folder = config.file.parent
    inside = {key: ref for key, ref in found.items() if _of_tower(key)}
    rest = {key: ref for key, ref in found.items() if not _of_tower(key)}
    tower: Mapping[str, Weight]
    if inside:
        vision = _inner_tower_shape(recipe, checkpoint, config)
        tower = match_tensors(inside, expected_clip_tower(vision), KEYS, where=folder)
        tower_files: tuple[Path, ...] = ()
    else:
        _check_tower_is_elsewhere(config)
        outer = read_clip_tower(checkpoint.part(TOWER, recipe))
        vision, tower, tower_files = outer.shape, outer.weights, outer.files
    architecture = Architecture(
        vision=vision,
        projector=ProjectorShape(
            width=vision.width, hidden_size=config.decoder.hidden_size, activation="gelu"
        ),
        decoder=config.decoder,
    )
    width = config.plain.get("mm_hidden_size", vision.width)
    compare_facts(recipe, folder, [("mm_hidden_size", width, vision.width)])
    check_architecture(recipe, architecture, folder)
    _check_projector(rest, folder)
    own = {key: shape for key, shape in expected(architecture).items() if key not in tower}
    keys = KEYS.tying(head=config.language.tie_word_embeddings)
    weights = {**tower, **match_tensors(rest, own, keys, where=folder)}
    generation = folder / "generation_config.json"
    configs = [config.file, *([generation] if generation.is_file() else [])]
    home = next((place for place in tokenizers if has_tokenizer(place)), folder)
    return ModelSource(
        layout=layout,
        architecture=architecture,
        weights=weights,
        dtype=main_dtype(weights),
        eos_token_ids=eos_token_ids(recipe, config.language, generation),
        image_token_id=None,
        tokenizer=read_tokenizer(home, recipe),
        files=(
            *((MAIN, file) for file in configs),
            *files,
            *((TOWER, file) for file in tower_files),
        ),
        tiles=_tiles(config) if recipe.image.tiles is not None else None,
    )


def _of_tower(key: str) -> bool:
    return key.startswith(("model.vision_tower.", "tower."))


def _inner_tower_shape(
    recipe: Recipe, checkpoint: Checkpoint, config: OriginalConfig
) -> VisionShape:
    """Sizes of a tower in the folder, of which config.json says only the name."""
    if recipe.architecture is not None:
        return recipe.architecture.vision
    if TOWER in checkpoint.parts:
        return read_clip_tower(checkpoint.parts[TOWER]).shape
    raise CheckpointError(
        f"{config.file} does not say the sizes of the vision tower",
        seen=f"mm_vision_tower {config.plain['mm_vision_tower']!r}"[:200],
        allowed="architecture in the recipe, or the repository it is from",
        fix=f"name its folder as well: --checkpoint {TOWER}=PATH",
    )


def _check_tower_is_elsewhere(config: OriginalConfig) -> None:
    if config.plain.get("unfreeze_mm_vision_tower"):
        raise CheckpointError(
            f"{config.file.parent} holds no vision tower, though its own was trained",
            seen="unfreeze_mm_vision_tower true, no model.vision_tower tensors",
            allowed="a checkpoint that holds the tower it was trained with",
            fix="get all of its files: the tower it started from would give wrong answers",
        )


def _check_projector(found: Mapping[str, Weight], folder: Path) -> None:
    if any(KEYS.canonical(key).startswith("projector.") for key in found):
        return
    alone = (folder / "mm_projector.bin").is_file()
    raise CheckpointError(
        f"{folder} holds no projector",
        seen="a language model without model.mm_projector tensors"
        + (", and mm_projector.bin, which is not read" if alone else ""),
        allowed="a whole LLaVA: language model and projector",
        fix="name a whole checkpoint, e.g. liuhaotian/llava-v1.5-7b, and no base model or "
        "pretrained projector",
    )


def _tiles(config: OriginalConfig) -> TilesSpec:
    """In the order of the config, as the authors' code goes through them."""
    sizes = tuple((height, width) for height, width in _resolutions(config.plain))
    return TilesSpec(resolutions=sizes, follows="authors")


def _resolutions(plain: Mapping[str, Any]) -> Any:
    """``image_grid_pinpoints``, which are (width, height) here, as [height, width]."""
    pinpoints = plain.get("image_grid_pinpoints")
    if isinstance(pinpoints, str):
        try:
            pinpoints = json.loads(pinpoints.replace("(", "[").replace(")", "]"))
        except ValueError:
            return pinpoints
    if not isinstance(pinpoints, list) or not all(
        isinstance(size, list) and [type(side) for side in size] == [int, int] for size in pinpoints
    ):
        return pinpoints
    return [[height, width] for width, height in pinpoints]
