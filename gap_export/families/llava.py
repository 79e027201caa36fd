"""LLaVA-1.5: CLIP tower with CLS, two-layer MLP projector, Llama decoder with RoPE."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig

from gap_export.errors import CheckpointError
from gap_export.families.clip_text import read_text_tower
from gap_export.families.clip_vision import (
    ClipVisionShape,
    ClipVisionTower,
    Projector,
    ProjectorShape,
    PrunedVisionEncoder,
)
from gap_export.families.components import (
    assemble,
    decoder_component,
    decoder_key,
    decoder_spec,
    embedding_component,
    joint_space_projection,
    text_component,
    vision_component,
)
from gap_export.families.limits import require
from gap_export.families.llama_decoder import LlamaDecoder, LlamaShape, TokenEmbedding
from gap_export.families.loading import KeyLayout, match_tensors, parse_config, shapes
from gap_export.families.reference import Device, Reference
from gap_export.manifest import PruningSpec
from gap_export.pruning import Reading, find_pruner
from gap_export.recipe import Recipe
from gap_export.weights import TensorRef, index_checkpoint, read_json_object

# transformers has written three layouts: 4.x, 4.52 and later in memory, and 5.x.
_KEYS = KeyLayout(
    prefixes=(
        ("language_model.model.", "decoder."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "decoder."),
        ("vision_tower.vision_model.", "tower."),
        ("model.vision_tower.vision_model.", "tower."),
        ("model.vision_tower.", "tower."),
        ("vision_tower.", "tower."),
        ("model.multi_modal_projector.", "projector."),
        ("multi_modal_projector.", "projector."),
    ),
    ignored_suffixes=(".rotary_emb.inv_freq", ".embeddings.position_ids"),
    tied={},
)


class LlavaFamily:
    """See :class:`gap_export.families.reference.Family`."""

    name = "llava"

    def readings(self, recipe: Recipe) -> frozenset[Reading]:
        """CLS is always there, the text tower where the recipe names one."""
        cls: frozenset[Reading] = frozenset({"cls_features", "cls_attention"})
        return cls | {"text"} if recipe.text_tower is not None else cls

    def build(
        self, recipe: Recipe, checkpoint: Path, pruning: PruningSpec, *, device: Device
    ) -> Reference:
        """Build the pruned reference; see :func:`gap_export.families.build_reference`."""
        source = _read_source(recipe, checkpoint)
        pruner = find_pruner(pruning.pruner)
        tower = recipe.text_tower if "text" in pruner.reads else None
        text = (
            read_text_tower(tower, checkpoint, vision_width=source.vision.width)
            if tower is not None
            else None
        )
        with torch.device("meta"):
            vision = PrunedVisionEncoder(
                tower=ClipVisionTower(
                    source.vision,
                    num_layers=source.select_index,
                    with_post_layernorm=text is not None,
                ),
                projector=Projector(source.projector),
                visual_projection=joint_space_projection(text),
                pruner=pruner,
                pruning=pruning,
            )
            components = [
                vision_component(vision, source.refs, recipe=recipe, text=text),
                *([text_component(text)] if text is not None else []),
                embedding_component(source.decoder, source.refs),
                decoder_component(source.decoder, source.refs),
            ]
        return assemble(
            components,
            device=device,
            decoder_spec=decoder_spec(source.decoder, source.eos_token_ids),
            image_token_id=source.image_token_id,
            text=text,
            tokenizer=checkpoint / "tokenizer.json",
            files=source.files,
        )


@dataclass(frozen=True, kw_only=True)
class _Source:
    vision: ClipVisionShape
    projector: ProjectorShape
    decoder: LlamaShape
    refs: Mapping[str, TensorRef]
    select_index: int
    eos_token_ids: tuple[int, ...]
    image_token_id: int
    files: tuple[Path, ...]


def _read_source(recipe: Recipe, folder: Path) -> _Source:
    found = index_checkpoint(folder)
    # Its annotations leave the nested configs open.
    config: Any = parse_config(LlavaConfig, folder / "config.json", num_tensors=len(found))
    _check_config(recipe, config, folder)
    vision, decoder = _vision_shape(config.vision_config), _decoder_shape(config.text_config)
    projector = ProjectorShape(
        width=vision.width,
        hidden_size=decoder.hidden_size,
        bias=config.multimodal_projector_bias,
        activation=config.projector_hidden_act,
    )
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    layout = replace(_KEYS, tied={"lm_head.weight": "decoder.embed_tokens.weight"} if tied else {})
    expected = _expected_tensors(vision, projector, decoder)
    refs = match_tensors(found, expected, layout, where=folder)
    generation = folder / "generation_config.json"
    files = [folder / "config.json", *([generation] if generation.is_file() else [])]
    return _Source(
        vision=vision,
        projector=projector,
        decoder=decoder,
        refs=refs,
        select_index=_select_index(recipe, vision, folder),
        eos_token_ids=_eos_token_ids(config.text_config, generation),
        image_token_id=config.image_token_index,
        files=(*files, *sorted({ref.file for ref in found.values()})),
    )


def _check_config(recipe: Recipe, config: Any, folder: Path) -> None:
    """Refuse what the modules here do not implement."""
    vision, text = config.vision_config, config.text_config
    kinds: list[tuple[str, Any, Any]] = [
        ("decoder type", text.model_type, "llama"),
        ("vision tower type", vision.model_type, "clip_vision_model"),
    ]
    # Configs of other kinds need not have what is read from here on.
    _compare(recipe, folder, kinds)
    patches = vision.image_size // vision.patch_size
    rope = text.rope_parameters or {}
    facts: list[tuple[str, Any, Any]] = [
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default"),
        ("vision_feature_layer", config.vision_feature_layer, recipe.select_layer),
        ("visual token grid", [patches, patches], [recipe.grid.rows, recipe.grid.cols]),
        ("image size", [vision.image_size] * 2, [recipe.image.height, recipe.image.width]),
    ]
    _compare(recipe, folder, facts)
    _check_decoder(text, folder / "config.json")


def _check_decoder(text: Any, file: Path) -> None:
    """Refuse sizes that do not fit each other."""
    groups = text.num_key_value_heads
    require(
        text.num_attention_heads % groups == 0,
        "text_config.num_key_value_heads",
        groups,
        f"a divisor of num_attention_heads, {text.num_attention_heads}",
        where=file,
    )
    require(
        "rope_theta" in (text.rope_parameters or {}),
        "text_config.rope_parameters",
        text.rope_parameters,
        "an object with rope_theta",
        where=file,
    )


def _compare(recipe: Recipe, folder: Path, facts: list[tuple[str, Any, Any]]) -> None:
    for what, seen, wanted in facts:
        if seen != wanted:
            raise CheckpointError(
                f"{folder}: {what} does not fit recipe {recipe.name}",
                seen=reprlib.repr(seen),
                allowed=str(wanted),
                fix="use a recipe written for this checkpoint",
            )


def _select_index(recipe: Recipe, vision: ClipVisionShape, folder: Path) -> int:
    """The select layer counted from the front: how many layers run."""
    # One more than layers: the first hidden state is what goes into the first layer.
    num_states = vision.num_layers + 1
    index = recipe.select_layer % num_states
    if not -num_states < recipe.select_layer < num_states or index == 0:
        raise CheckpointError(
            f"{folder}: the vision tower has no such select layer",
            seen=recipe.select_layer,
            allowed=f"1..{num_states - 1} or {1 - num_states}..-1",
        )
    return index


def _eos_token_ids(text: Any, generation: Path) -> tuple[int, ...]:
    plain = read_json_object(generation) if generation.is_file() else {}
    eos = plain.get("eos_token_id", text.eos_token_id)
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(type(i) is int and 0 <= i < text.vocab_size for i in ids):
        raise CheckpointError(
            "no usable eos_token_id in generation_config.json or config.json",
            seen=reprlib.repr(eos),
            allowed=f"ids in 0..{text.vocab_size - 1}",
        )
    return ids


def _expected_tensors(
    vision: ClipVisionShape, projector: ProjectorShape, decoder: LlamaShape
) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the checkpoint, those the export never reads included."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "tower.": ClipVisionTower(
                vision, num_layers=vision.num_layers, with_post_layernorm=True
            ),
            "projector.": Projector(projector),
            "decoder.embed_tokens.": TokenEmbedding(decoder),
        }
        layers = shapes(LlamaDecoder(decoder))
    expected = {p + key: shape for p, part in parts.items() for key, shape in shapes(part).items()}
    return expected | {decoder_key(key): shape for key, shape in layers.items()}


def _vision_shape(config: Any) -> ClipVisionShape:
    return ClipVisionShape(
        width=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        activation=config.hidden_act,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )


def _decoder_shape(config: Any) -> LlamaShape:
    return LlamaShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        # Older configs leave it out.
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        activation=config.hidden_act,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
