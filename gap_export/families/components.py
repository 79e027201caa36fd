"""The components families have in common, with their interface (shared names and shapes)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gap_export.errors import CheckpointError
from gap_export.families.clip_text import ClipTextEncoder, TextTowerSource
from gap_export.families.clip_vision import PrunedVisionEncoder
from gap_export.families.llama_decoder import (
    LlamaDecoder,
    LlamaShape,
    TokenEmbedding,
    rope_frequencies,
)
from gap_export.families.loading import fill_module
from gap_export.families.reference import Component, Device, Reference
from gap_export.manifest import DecoderSpec, TensorSpec, TextEncoderSpec
from gap_export.pruning import FixedPruner
from gap_export.recipe import Recipe
from gap_export.weights import TensorRef

_TOKENIZER = "tokenizer.json"
_TEXT_TOKENIZER = "text_tokenizer.json"


def vision_component(
    module: PrunedVisionEncoder,
    refs: Mapping[str, TensorRef],
    *,
    recipe: Recipe,
    text: TextTowerSource | None,
) -> Component:
    """Picture to kept features. ``refs`` go by the module's own names."""
    hidden_size = module.projector.linear_2.out_features
    num_emitted = module.pruning.num_emitted_tokens
    rows = "num_images" if text is None else "batch_size"
    inputs = [_spec("pixel_values", "num_images", 3, recipe.image.height, recipe.image.width)]
    sizes = {"num_images": 2}
    if text is not None:
        refs = {**refs, "visual_projection.weight": text.visual_projection}
        inputs.append(_spec("text_embeds", "batch_size", text.shape.embed_dim))
        sizes["batch_size"] = 3
    return Component(
        name="vision_encoder",
        prunes=True,
        module=module,
        inputs=tuple(inputs),
        outputs=(
            _spec("image_features", rows, num_emitted, hidden_size),
            _spec("keep_indices", rows, num_emitted, dtype="int64"),
        ),
        example_sizes=sizes,
        weight_refs={key: refs[key] for key in module.state_dict()},
        constants=_fixed_places(module, recipe),
    )


def joint_space_projection(text: TextTowerSource | None) -> nn.Linear | None:
    """Vision features into CLIP's joint space; None where no text is read."""
    if text is None:
        return None
    embed_dim, width = text.visual_projection.shape
    return nn.Linear(width, embed_dim, bias=False)


def text_component(text: TextTowerSource) -> Component:
    """Expression to its CLIP embedding."""
    return Component(
        name="text_encoder",
        module=ClipTextEncoder(text.shape),
        inputs=(_spec("input_ids", "batch_size", "text_length", dtype="int64"),),
        outputs=(_spec("text_embeds", "batch_size", text.shape.embed_dim),),
        example_sizes={"batch_size": 2, "text_length": 5},
        weight_refs=text.refs,
        constants={},
    )


def embedding_component(shape: LlamaShape, refs: Mapping[str, TensorRef]) -> Component:
    """Prompt ids to vectors."""
    return Component(
        name="embed_tokens",
        module=TokenEmbedding(shape),
        inputs=(_spec("input_ids", "batch_size", "sequence_length", dtype="int64"),),
        outputs=(_spec("inputs_embeds", "batch_size", "sequence_length", shape.hidden_size),),
        example_sizes={"batch_size": 2, "sequence_length": 5},
        weight_refs={"weight": refs["decoder.embed_tokens.weight"]},
        constants={},
    )


def decoder_component(shape: LlamaShape, refs: Mapping[str, TensorRef]) -> Component:
    """Prefill and decode in one graph; position ids explicit, not yet remapped."""
    module = LlamaDecoder(shape)
    width, heads = shape.head_dim, shape.num_key_value_heads
    cache = [f"{i}.{part}" for i in range(shape.num_layers) for part in ("key", "value")]
    past = [
        _spec(f"past_key_values.{name}", "batch_size", heads, "past_sequence_length", width)
        for name in cache
    ]
    present = [
        _spec(f"present.{name}", "batch_size", heads, "total_sequence_length", width)
        for name in cache
    ]
    return Component(
        name="decoder_model_merged",
        module=module,
        inputs=(
            _spec("inputs_embeds", "batch_size", "sequence_length", shape.hidden_size),
            _spec("attention_mask", "batch_size", "total_sequence_length", dtype="int64"),
            _spec("position_ids", "batch_size", "sequence_length", dtype="int64"),
            *past,
        ),
        outputs=(_spec("logits", "batch_size", 1, shape.vocab_size), *present),
        example_sizes={
            "batch_size": 2,
            "sequence_length": 5,
            "past_sequence_length": 7,
            "total_sequence_length": 12,
        },
        weight_refs={key: refs[decoder_key(key)] for key in module.state_dict()},
        constants={"inv_freq": rope_frequencies(shape.rope_theta, width).numpy()},
        kv_contract="concat",
    )


def decoder_spec(shape: LlamaShape, eos_token_ids: tuple[int, ...]) -> DecoderSpec:
    """Facts of the decoder for the manifest."""
    return DecoderSpec(
        num_layers=shape.num_layers,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        eos_token_ids=eos_token_ids,
    )


def decoder_key(key: str) -> str:
    """Name in the key map of a tensor of :class:`LlamaDecoder`."""
    return key if key.startswith("lm_head.") else f"decoder.{key}"


def assemble(
    components: Sequence[Component],
    *,
    device: Device,
    decoder_spec: DecoderSpec,
    image_token_id: int,
    text: TextTowerSource | None,
    tokenizer: Path,
    files: Sequence[Path],
) -> Reference:
    """Put a reference together and, on the CPU, load its weights.

    Raises:
        CheckpointError: a tokenizer is missing, or a weight cannot be read.
    """
    tokenizers = [(_existing(tokenizer), _TOKENIZER)]
    text_spec = None
    if text is not None:
        tokenizers.append((_existing(text.tokenizer), _TEXT_TOKENIZER))
        files = (*files, *text.files)
        text_spec = TextEncoderSpec(
            template=text.tower.template,
            tokenizer_file=_TEXT_TOKENIZER,
            max_tokens=text.shape.max_tokens,
        )
    for component in components:
        component.module.eval()
        component.module.requires_grad_(False)
        if device == "cpu":
            fill_module(component)
    used = sorted({ref.file for c in components for ref in c.weight_refs.values()})
    return Reference(
        components=tuple(components),
        decoder_spec=decoder_spec,
        text_encoder_spec=text_spec,
        image_token_id=image_token_id,
        weight_files=_bundle_names(used),
        tokenizer_files=tuple(tokenizers),
        checkpoint_files=(*files, *(source for source, _ in tokenizers)),
    )


def _fixed_places(module: PrunedVisionEncoder, recipe: Recipe) -> dict[str, NDArray[Any]]:
    if not isinstance(module.pruner, FixedPruner):
        return {}
    pruning = module.pruning
    places = module.pruner.places(
        recipe.grid, num_kept_tokens=pruning.num_kept_tokens, seed=pruning.seed
    )
    return {"fixed_places": np.sort(places) if pruning.order == "raster" else places}


def _bundle_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each weight file; the folder is joined on where two are called the same."""
    names: dict[Path, str] = {}
    for file in sorted(files, key=lambda f: len(f.parts)):
        name = file.name if file.name not in names.values() else f"{file.parent.name}-{file.name}"
        assert name not in names.values()
        names[file] = name
    return names


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(
            "checkpoint file not found",
            seen=file,
            fix="save the tokenizer with transformers' save_pretrained into that folder",
        )
    return file


def _spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)
