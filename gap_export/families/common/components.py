"""The components families have in common, with their interface (shared names and shapes)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gap_export.checkpoint.weights import SAFETENSORS_NAMES, TORCH_DTYPES, cast
from gap_export.errors import CheckpointError, RecipeError, UsageError
from gap_export.families.common.checkpoints.clip_text_tower import TextTowerSource
from gap_export.families.common.checkpoints.unread import look_for_unread
from gap_export.families.common.decoder_kind import DecoderKind
from gap_export.families.common.modules.clip_text import ClipTextEncoder
from gap_export.families.common.modules.decoder_stack import DecoderStack, TokenEmbedding
from gap_export.families.common.modules.expected import NEWLINE_KEY, decoder_key
from gap_export.families.common.reference import (
    Component,
    Device,
    ModelSource,
    Reference,
    spec,
)
from gap_export.pruning import find_preset, find_pruner
from gap_export.spec.manifest import Attention, DecoderSpec, PruningSpec, TextEncoderSpec
from gap_export.spec.manifest.facts import MAX_TOKENS, SLOT
from gap_export.spec.recipe import Recipe

_TOKENIZER = "tokenizer.json"
_TEXT_TOKENIZER = "text_tokenizer.json"
_I64 = "int64"


def text_component(text: TextTowerSource, *, dtype: str) -> Component:
    """Expression to its CLIP embedding."""
    return Component(
        name="text_encoder",
        module=ClipTextEncoder(text.shape),
        inputs=(spec("input_ids", "batch_size", "text_length", dtype=_I64),),
        outputs=(spec("text_embeds", "batch_size", text.shape.embed_dim, dtype=dtype),),
        example_sizes={"batch_size": 2, "text_length": 5},
        weight_refs=text.weights,
        constants={},
        repeated="encoder.layers",
    )


def embedding_component(source: ModelSource, *, dtype: str) -> Component:
    """Prompt ids to vectors."""
    shape = source.architecture.decoder
    inputs = (spec("input_ids", "batch_size", "sequence_length", dtype=_I64),)
    hidden = spec("inputs_embeds", "batch_size", "sequence_length", shape.embeds_size, dtype=dtype)
    return Component(
        name="embed_tokens",
        module=TokenEmbedding(shape),
        inputs=inputs,
        outputs=(hidden,),
        example_sizes={"batch_size": 2, "sequence_length": 5},
        weight_refs={"weight": source.weights["decoder.embed_tokens.weight"]},
        constants={},
    )


def decoder_component(
    source: ModelSource, kind: DecoderKind, *, dtype: str, attention: Attention = "plain"
) -> Component:
    """Prefill and decode in one graph; position ids explicit, not yet remapped.

    Raises:
        UsageError: proportional attention of a decoder that knows none.
    """
    shape = source.architecture.decoder
    module = kind.module(shape)
    if attention == "proportional":
        if not isinstance(module, DecoderStack):
            raise UsageError(
                "this family's decoder has no proportional attention",
                seen=type(module).__name__,
                allowed="a DecoderStack",
                fix="leave out --attention",
            )
        module.proportional_attention = True
    axes = (shape.position_axes,) if shape.position_axes > 1 else ()
    width, heads = shape.head_dim, shape.num_key_value_heads
    cache = [f"{i}.{part}" for i in range(shape.num_layers) for part in ("key", "value")]
    past = [
        spec(
            f"past_key_values.{name}",
            *("batch_size", heads, "past_sequence_length", width),
            dtype=dtype,
        )
        for name in cache
    ]
    present = [
        spec(
            f"present.{name}",
            *("batch_size", heads, "total_sequence_length", width),
            dtype=dtype,
        )
        for name in cache
    ]
    return Component(
        name="decoder_model_merged",
        module=module,
        inputs=(
            spec("inputs_embeds", "batch_size", "sequence_length", shape.embeds_size, dtype=dtype),
            spec("attention_mask", "batch_size", "total_sequence_length", dtype=_I64),
            spec("position_ids", *axes, "batch_size", "sequence_length", dtype=_I64),
            *past,
        ),
        outputs=(spec("logits", "batch_size", 1, shape.vocab_size, dtype=dtype), *present),
        example_sizes={
            "batch_size": 2,
            "sequence_length": 5,
            "past_sequence_length": 7,
            "total_sequence_length": 12,
        },
        weight_refs={key: source.weights[decoder_key(key)] for key in module.state_dict()},
        constants={name: value.numpy() for name, value in kind.constants(shape).items()},
        kv_contract="concat",
        repeated="layers",
        num_leading=shape.num_taps,
        channel_groups=kind.channel_groups,
    )


def assemble(
    components: Sequence[Component],
    source: ModelSource,
    *,
    recipe: Recipe,
    pruning: PruningSpec,
    text: TextTowerSource | None,
    dtype: str,
    device: Device,
) -> Reference:
    """Put a reference together and, on the CPU, load its weights.

    Raises:
        CheckpointError: a tokenizer is missing, or a weight cannot be read.
        RecipeError: the pruner reads the question, and the recipe does not say where it stands.
    """
    files = source.files
    assets = {_TOKENIZER: _existing(source.tokenizer)}
    shape = source.architecture.decoder
    text_spec = None
    if text is not None:
        assets[_TEXT_TOKENIZER] = _existing(text.tokenizer)
        files = (*files, *text.files)
        text_spec = TextEncoderSpec(
            template=_read_template(recipe, pruning, text.tower.template),
            tokenizer_file=_TEXT_TOKENIZER,
            max_tokens=text.shape.max_tokens,
            long_texts=find_preset(pruning.pruner).long_texts,
        )
    elif find_pruner(pruning.pruner).reads_text:
        text_spec = TextEncoderSpec(
            template=_read_template(recipe, pruning, SLOT),
            tokenizer_file=_TOKENIZER,
            # A question is shorter than its prompt, which has to fit.
            max_tokens=min(shape.max_position_embeddings, MAX_TOKENS),
            long_texts="segments",
            component="embed_tokens",
        )
    torch_dtype = TORCH_DTYPES[SAFETENSORS_NAMES[dtype]]
    for component in components:
        # Parameters alone: RoPE's frequencies stay float32 in any model.
        for parameter in component.module.parameters():
            parameter.data = parameter.data.to(torch_dtype)
        component.module.eval()
        component.module.requires_grad_(False)
        if device == "cpu":
            _fill_module(component, dtype)
    return Reference(
        components=tuple(components),
        dtype=dtype,
        decoder_spec=DecoderSpec(
            num_layers=shape.num_layers,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.max_position_embeddings,
            eos_token_ids=source.eos_token_ids,
            position_axes=shape.position_axes,
            num_heads=shape.num_heads
            if shape.num_heads * shape.head_dim != shape.hidden_size
            else None,
            num_taps=shape.num_taps,
            rope_axes=shape.frequency_axes() if shape.position_axes > 1 else (),
        ),
        text_encoder_spec=text_spec,
        image_token_id=source.image_token_id,
        newline_weight=source.weights.get(NEWLINE_KEY),
        assets=assets,
        checkpoint_files=tuple(dict.fromkeys(files)),
        tiles=source.tiles,
        notes=(*source.notes, *look_for_unread(files)),
    )


def _read_template(recipe: Recipe, pruning: PruningSpec, expression: str) -> str:
    """What is read of the text; ``expression`` where that is no question."""
    if pruning.pruner_text == "expression":
        return expression
    question = recipe.prompt.question_template()
    if question is None:
        raise RecipeError(
            f"recipe {recipe.name} does not say where the question stands in its prompt",
            allowed="prompt.question: start, end and image, as they are in prompt.template",
        )
    return question


def _fill_module(component: Component, dtype: str) -> None:
    """Give a meta module its weights and constants, on the CPU, in place."""
    module = component.module
    weights = {
        key: cast(weight, SAFETENSORS_NAMES[dtype]).load()
        for key, weight in component.weight_refs.items()
    }
    module.load_state_dict(weights, strict=True, assign=True)
    module.requires_grad_(False)
    for name, value in component.constants.items():
        owner, _, leaf = name.rpartition(".")
        buffer = torch.from_numpy(value.copy())
        module.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)


def _existing(tokenizer: Path | bytes) -> Path | bytes:
    if isinstance(tokenizer, Path) and not tokenizer.is_file():
        raise CheckpointError(
            "checkpoint file not found",
            seen=tokenizer,
            fix="save the tokenizer with transformers' save_pretrained into that folder",
        )
    return tokenizer
