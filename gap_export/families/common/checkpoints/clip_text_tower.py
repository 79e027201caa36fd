"""Reads the CLIP text tower of pruners that read the expression.

Two forms are known: OpenAI's whole CLIP (``CLIPModel``: text tower, vision tower and both
projections), and a ``CLIPTextModelWithProjection`` beside ``visual_projection.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPTextConfig

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import Weight, index_files, read_json_object
from gap_export.families.common.checkpoints.configs import layer_sizes
from gap_export.families.common.checkpoints.limits import require
from gap_export.families.common.checkpoints.matching import KeyLayout, match_tensors, parse_config
from gap_export.families.common.checkpoints.parts import Stored, index_folder
from gap_export.families.common.modules.clip_text import LEGACY_EOS_ID
from gap_export.families.common.modules.expected import expected_text_tensors
from gap_export.spec.architecture import TextShape
from gap_export.spec.recipe import Recipe, TextTower

# float32 holds every integer up to here; the pooling compares candidates times slots.
_MAX_KEY = 1 << 24
_VISUAL_PROJECTION = "visual_projection.safetensors"
_VISUAL_PROJECTION_KEY = "visual_projection.weight"
_KEYS = KeyLayout(prefixes=(("text_model.", ""),), ignored_suffixes=(".embeddings.position_ids",))
# The rest of a whole CLIP, of which the text tower is one half.
_OTHER_HALF = ("vision_model.", _VISUAL_PROJECTION_KEY, "logit_scale")


@dataclass(frozen=True, kw_only=True)
class TextTowerSource:
    """A text tower, checked.

    Attributes:
        tower: What the recipe says.
        shape: Its sizes.
        weights: By the names of ``ClipTextEncoder``.
        visual_projection: [E, vision width], from the vision tower into the joint space.
        tokenizer: The tower's tokenizer.json, or the content of one.
        files: All files that were read, with their part.
    """

    tower: TextTower
    shape: TextShape
    weights: Mapping[str, Weight]
    visual_projection: Weight
    tokenizer: Path | bytes
    files: tuple[tuple[str, Path], ...]


def read_text_tower(
    recipe: Recipe, checkpoint: Checkpoint, *, vision_width: int
) -> TextTowerSource:
    """Check the text tower a recipe names.

    Args:
        recipe: Has a text tower.
        checkpoint: Its part for the role the recipe says.
        vision_width: D of the vision tower it must go with.

    Raises:
        CheckpointError: the part, a file or a tensor is missing, damaged or does not match.
    """
    tower = recipe.text_tower
    assert tower is not None, "only asked for where the recipe has one"
    folder = checkpoint.part(tower.role, recipe) / tower.folder
    found = index_folder(folder)
    config_file = folder / "config.json"
    whole = read_json_object(config_file).get("model_type") == CLIPConfig.model_type
    config: Any
    projections: Mapping[str, Stored]
    text: Mapping[str, Stored]
    if whole:
        config = parse_config(CLIPConfig, config_file, num_tensors=len(found)).text_config
        projections = found
        text = {key: ref for key, ref in found.items() if not key.startswith(_OTHER_HALF)}
    else:
        config = parse_config(CLIPTextConfig, config_file, num_tensors=len(found))
        projections = index_files([folder / _VISUAL_PROJECTION])
        text = found
    shape = _text_shape(config, config_file)
    weights = match_tensors(text, expected_text_tensors(shape), _KEYS, where=folder)
    key = _VISUAL_PROJECTION_KEY
    projection = match_tensors(
        {name: ref for name, ref in projections.items() if name == key},
        {key: (shape.embed_dim, vision_width)},
        _KEYS,
        where=folder,
    )[key]
    weight_files = {ref.file for ref in (*text.values(), projection)}
    return TextTowerSource(
        tower=tower,
        shape=shape,
        weights=weights,
        visual_projection=projection,
        tokenizer=folder / "tokenizer.json",
        files=tuple((tower.role, file) for file in (config_file, *sorted(weight_files))),
    )


def _text_shape(config: Any, file: Path) -> TextShape:
    """Typed form of a ``CLIPTextConfig``, whose own annotations leave every field open."""
    eos, num_ids = config.eos_token_id, config.vocab_size
    require(
        type(eos) is int and 0 <= eos < num_ids,
        "eos_token_id",
        eos,
        f"one id, 0..{num_ids - 1}",
        where=file,
    )
    slots = config.max_position_embeddings
    # See ClipTextEncoder: ids are compared only by the old convention.
    candidates = num_ids if eos == LEGACY_EOS_ID else 2
    require(
        slots * candidates <= _MAX_KEY,
        "max_position_embeddings",
        slots,
        f"at most {_MAX_KEY // candidates}",
        where=file,
    )
    return TextShape(
        **layer_sizes(config),
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings,
        embed_dim=config.projection_dim,
        eos_token_id=config.eos_token_id,
    )
