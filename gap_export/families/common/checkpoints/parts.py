"""Models that a checkpoint builds on and does not hold: a Llama, a CLIP vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from gap_export.checkpoint.weights import (
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    PickledTensor,
    TensorRef,
    index_checkpoint,
    index_pickles,
)
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families.common.checkpoints.configs import clip_vision_shape, decoder_shape
from gap_export.families.common.checkpoints.matching import (
    KeyLayout,
    match_tensors,
    model_type_of,
    parse_config,
)
from gap_export.families.common.modules.expected import expected_clip_tower, expected_decoder
from gap_export.spec.architecture import DecoderShape, VisionShape
from gap_export.spec.recipe import Recipe

Stored = TensorRef | PickledTensor

LLAMA_KEYS = KeyLayout(
    prefixes=(("model.", "decoder."),), ignored_suffixes=(".rotary_emb.inv_freq",)
)
_LANGUAGE_MODELS: Mapping[str, type[LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config]] = {
    kind.model_type: kind for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
}
_CLIP_KEYS = KeyLayout(
    prefixes=(("vision_model.", "tower."),),
    ignored_suffixes=(".embeddings.position_ids",),
)
# The rest of a whole CLIP.
_NO_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


_Shape = TypeVar("_Shape", DecoderShape, VisionShape)


@dataclass(frozen=True, kw_only=True)
class CheckedPart(Generic[_Shape]):
    """A language model or a vision tower whose tensors were found to be exactly its own.

    Attributes:
        folder: Where it is.
        shape: What its config.json says.
        weights: ``decoder.*`` and ``lm_head.weight``, or ``tower.*``.
        files: All files that were read.
    """

    folder: Path
    shape: _Shape
    weights: Mapping[str, Stored]
    files: tuple[Path, ...]


LanguageModel = CheckedPart[DecoderShape]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a whole model's weights, or the index of their files."""
    names = (WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME, PICKLE_INDEX_NAME)
    return any((folder / name).is_file() for name in names)


def index_folder(folder: Path) -> Mapping[str, Stored]:
    """Every tensor of a folder: its safetensors files or, without those, its PyTorch pickles.

    Raises:
        CheckpointError: there are neither, or they are incomplete or damaged.
    """
    has_safetensors = (folder / WEIGHTS_NAME).is_file() or (folder / INDEX_NAME).is_file()
    if has_safetensors or not folder.is_dir():
        return index_checkpoint(folder)
    if has_weights(folder):
        return index_pickles(folder)
    raise CheckpointError(
        "no weights in the checkpoint folder",
        seen=folder,
        allowed=f"{WEIGHTS_NAME} or {PICKLE_NAME}, or shards with {INDEX_NAME} or "
        f"{PICKLE_INDEX_NAME}",
        fix="download the weights into that folder",
    )


def read_language_model(folder: Path) -> LanguageModel:
    """Read the headers of a language model: Llama, Mistral, Qwen2 or Qwen3.

    Raises:
        CheckpointError: anything is missing, damaged, of another architecture or left over.
    """
    found = index_folder(folder)
    config_file = folder / "config.json"
    # Where it is of another kind than these, the first one's message says so.
    kind = _LANGUAGE_MODELS.get(model_type_of(folder) or "", LlamaConfig)
    config: Any = parse_config(kind, config_file, num_tensors=len(found))
    shape = decoder_shape(config, config_file)
    keys = LLAMA_KEYS.tying(head=config.tie_word_embeddings)
    weights = match_tensors(found, expected_decoder(shape), keys, where=folder)
    return CheckedPart(
        folder=folder,
        shape=shape,
        weights=weights,
        files=(config_file, *sorted({ref.file for ref in found.values()})),
    )


def read_clip_tower(folder: Path) -> CheckedPart[VisionShape]:
    """Read the headers of a CLIP vision tower, whether the folder holds the text tower or not.

    Raises:
        CheckpointError: anything is missing, damaged, of another architecture or left over.
    """
    found = index_folder(folder)
    config_file = folder / "config.json"
    config: Any
    if model_type_of(folder) == CLIPConfig.model_type:
        config = parse_config(CLIPConfig, config_file, num_tensors=len(found)).vision_config
        found = {key: ref for key, ref in found.items() if not key.startswith(_NO_TOWER)}
    else:
        config = parse_config(CLIPVisionConfig, config_file, num_tensors=len(found))
    shape = clip_vision_shape(config, config_file)
    weights = match_tensors(found, expected_clip_tower(shape), _CLIP_KEYS, where=folder)
    return CheckedPart(
        folder=folder,
        shape=shape,
        weights=weights,
        files=(config_file, *sorted({ref.file for ref in found.values()})),
    )


def check_base(base: LanguageModel, wanted: DecoderShape, recipe: Recipe, *, role: str) -> None:
    """Refuse a base model that is not of the sizes it must have, its vocabulary included.

    Args:
        base: The part of the checkpoint.
        wanted: The sizes.
        recipe: Says in words what the base is.
        role: The part's role.

    Raises:
        CheckpointError: with every size that differs.
    """
    names = [field.name for field in fields(DecoderShape) if field.name != "tied_embeddings"]
    pairs = [(name, getattr(base.shape, name), getattr(wanted, name)) for name in names]
    wrong = [(name, seen, allowed) for name, seen, allowed in pairs if seen != allowed]
    if wrong:
        raise CheckpointError(
            f"{base.folder} is not the base model of {recipe.name}",
            seen=", ".join(f"{name} {seen}" for name, seen, _ in wrong),
            allowed=", ".join(f"{name} {allowed}" for name, _, allowed in wrong),
            fix=f"use {what_it_is(recipe, role)}",
        )


def what_it_is(recipe: Recipe, role: str) -> str:
    """A part of a recipe in words."""
    part = recipe.checkpoint.parts.get(role)
    return part.what if part is not None else f"the {role} model of {recipe.name}"


def end_of_answer(recipe: Recipe) -> tuple[int, ...]:
    """Ids that end an answer, where no config says them right.

    Raises:
        RecipeError: the recipe does not say them either.
    """
    if not recipe.end_of_answer:
        raise RecipeError(
            f"recipe {recipe.name} does not say what ends an answer",
            seen="no end_of_answer",
            allowed='texts of special_tokens, e.g. ["</s>"]: the config of these weights is wrong '
            "or silent",
        )
    return tuple(recipe.special_tokens[name] for name in recipe.end_of_answer)
