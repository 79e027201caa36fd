"""What the two forms of InternVL's checkpoints share: checks, sizes, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import InternVLConfig

from gap_export.checkpoint.weights import Weight, reshaped
from gap_export.families.common.checkpoints.configs import (
    check_architecture,
    compare_facts,
    decoder_shape,
    layer_sizes,
)
from gap_export.families.common.checkpoints.limits import require
from gap_export.families.common.checkpoints.matching import (
    KeyLayout,
    build_config,
    match_tensors,
)
from gap_export.families.common.checkpoints.one_folder import source_of_folder
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.spec.architecture import Architecture, ProjectorShape, VisionShape
from gap_export.spec.recipe import Recipe

# torch's default, which the projector's norm is left with.
_PROJECTOR_NORM_EPS = 1e-5
# The kinds of RoPE: scaling by "dynamic" begins beyond max_position_embeddings.
_ROPE_TYPES = ("default", "dynamic")
_DECODERS = ("qwen2", "qwen3")
# norm_type, use_qk_norm, attention_bias.
_TOWER = ("layer_norm", False, True)
_JOIN = 2


def read_config(plain: Mapping[str, Any], file: Path, *, num_tensors: int) -> Any:
    """Parse and check a config in the form of transformers.

    Args:
        plain: Its content; sides of images and patches may be lists of two.
        file: Named in messages.
        num_tensors: Number of tensors there are; the config may not claim more layers.

    Returns:
        An ``InternVLConfig``, whose annotations leave the nested configs open.

    Raises:
        CheckpointError: it does not parse, or is of a model that is not implemented.
    """
    text = plain.get("text_config")
    kind = text.get("model_type") if isinstance(text, Mapping) else None
    require(kind in _DECODERS, "language model_type", kind, ", ".join(_DECODERS), where=file)
    vision = plain.get("vision_config")
    if isinstance(vision, Mapping):
        sides = {key: side_of(vision, key, file) for key in ("image_size", "patch_size")}
        given = {key: side for key, side in sides.items() if side is not None}
        plain = {**plain, "vision_config": {**vision, **given}}
    config: Any = build_config(InternVLConfig, plain, file, num_tensors=num_tensors)
    tower = config.vision_config
    for key, seen, wanted, words in (
        (
            "norm_type, use_qk_norm and attention_bias of the vision tower",
            (tower.norm_type, tower.use_qk_norm, tower.attention_bias),
            _TOWER,
            "InternViT-300M; InternViT-6B is not implemented",
        ),
        ("use_mask_token", tower.use_mask_token, False, "no masked patches"),
        ("use_mean_pooling", tower.use_mean_pooling, True, "no norm behind the tower"),
        (
            "use_absolute_position_embeddings",
            tower.use_absolute_position_embeddings,
            True,
            "a position for each patch",
        ),
        ("num_channels", tower.num_channels, 3, "color images"),
        ("downsample_ratio", config.downsample_ratio, 1 / _JOIN, "2x2 patches to a token"),
        (
            "vision_feature_select_strategy",
            config.vision_feature_select_strategy,
            "default",
            "CLS left out",
        ),
    ):
        require(seen == wanted, key, seen, f"{wanted}: {words}", where=file)
    return config


def build_source(
    recipe: Recipe,
    folder: Path,
    config: Any,
    found: Mapping[str, Weight],
    keys: KeyLayout,
    expected: Expected,
    *,
    layout: str,
    files: Iterable[Path],
) -> ModelSource:
    """Match a checkpoint's tensors with the model its config describes.

    Args:
        recipe: What the model is.
        folder: The checkpoint.
        config: From :func:`read_config`.
        found: Its tensors by the names in its files, none of them fused.
        keys: Turns those names into ours.
        expected: Gives the shape of every tensor of a model.
        layout: The layout's name.
        files: Those with the tensors.

    Raises:
        CheckpointError: sizes or tensors do not fit recipe and config.
    """
    file = folder / "config.json"
    compare_facts(
        recipe,
        folder,
        [
            ("vision_feature_layer", config.vision_feature_layer, recipe.select_layer),
            # Of the original form it is the recipe's.
            (
                "image_token_id",
                config.image_token_id,
                recipe.special_tokens.get(recipe.prompt.image_token, config.image_token_id),
            ),
        ],
    )
    architecture = _architecture(config, file)
    check_architecture(recipe, architecture, folder)
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    weights = match_tensors(
        {key: _without_batch(key, weight) for key, weight in found.items()},
        expected(architecture),
        keys.tying(head=tied),
        where=folder,
    )
    return source_of_folder(
        recipe,
        folder,
        config,
        architecture,
        weights,
        layout=layout,
        image_token_id=config.image_token_id,
        files=files,
    )


def _architecture(config: Any, file: Path) -> Architecture:
    tower = config.vision_config
    decoder = decoder_shape(config.text_config, file, rope_types=_ROPE_TYPES)
    vision = VisionShape(
        **layer_sizes(tower),
        image_size=tower.image_size[0],
        patch_size=tower.patch_size[0],
    )
    projector = ProjectorShape(
        width=vision.width * _JOIN * _JOIN,
        hidden_size=decoder.hidden_size,
        activation=config.projector_hidden_act,
        joined_rows=_JOIN,
        norm="layer_norm",
        norm_eps=_PROJECTOR_NORM_EPS,
    )
    return Architecture(vision=vision, projector=projector, decoder=decoder)


def side_of(vision: Mapping[str, Any], key: str, file: Path) -> Any:
    """The side of a square that a config gives once or twice; None where it does not.

    Raises:
        CheckpointError: two sides that differ.
    """
    size = vision.get(key)
    if not isinstance(size, list):
        return size
    square = len(size) == 2 and size[0] == size[1]
    require(square, f"vision_config.{key}", size, "two equal numbers, or one", where=file)
    return size[0]


def _without_batch(key: str, weight: Weight) -> Weight:
    """CLS [1, 1, D] as [D], positions [1, 1 + N, D] as [1 + N, D]; others as they are."""
    if key.endswith((".cls_token", ".class_embedding")) and weight.shape[:2] == (1, 1):
        return reshaped(weight, weight.shape[2:])
    if key.endswith((".position_embeddings", ".position_embedding")) and weight.shape[:1] == (1,):
        return reshaped(weight, weight.shape[1:])
    return weight
