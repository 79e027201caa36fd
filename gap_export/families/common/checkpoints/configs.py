"""From transformers' configs to the sizes our modules read, refusing what they do not implement."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from gap_export.checkpoint.weights import read_json_object
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families.common.checkpoints.limits import require
from gap_export.spec.architecture import Architecture, DecoderShape, VisionShape
from gap_export.spec.recipe import Recipe

# Whose attention has which biases; Llama's and Qwen3's configs say it themselves.
_BIASES: Mapping[str, bool | Literal["qkv"] | None] = {
    "llama": None, "mistral": False, "qwen2": "qkv", "qwen3": None,
}  # fmt: skip
# What differs between checkpoints of one model: conversions pad the vocabulary (32,064 rows for
# LLaVA's 32,000 tokens and the image's), and may store a tied head all the same.
_FREE = ("vocab_size", "tied_embeddings")


def decoder_shape(
    text: Any, file: Path, *, kind: str | None = None, rope_types: tuple[str, ...] = ("default",)
) -> DecoderShape:
    """What the config of a Llama, Mistral, Qwen2 or Qwen3 says.

    Args:
        text: The parsed config; its class leaves most fields open.
        file: Where it was read, for messages.
        kind: Which of them it is, where its model_type has another name.
        rope_types: Kinds of RoPE that are plain RoPE for all ids below max_position_embeddings,
            which are those that a session accepts.

    Raises:
        CheckpointError: a kind of decoder, RoPE or attention that is not implemented.
    """
    where: Any = file
    kind = kind or text.model_type
    require(kind in _BIASES, "decoder model_type", kind, ", ".join(_BIASES), where=where)
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    require(
        heads % groups == 0,
        "num_key_value_heads",
        groups,
        f"a divisor of num_attention_heads, {heads}",
        where=where,
    )
    rope = text.rope_parameters or {}
    theta: Any = rope.get("rope_theta")
    # A null gets past check_values, and transformers leaves it as it is.
    require(type(theta) in (int, float), "rope_theta", theta, "a number above 0", where=where)
    allowed = f"{' or '.join(rope_types)}: RoPE without scaling"
    # The old name may be there as well and, in a file that was edited by hand, say something else.
    for key in ("rope_type", "type"):
        scaling = rope.get(key, "default")
        require(scaling in rope_types, key, scaling, allowed, where=where)
    window = getattr(text, "sliding_window", None)
    require(window is None, "sliding_window", window, "null: every token sees all", where=where)
    bias = _BIASES[kind]
    return DecoderShape(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_key_value_heads=groups,
        # Older configs leave it out.
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(theta),
        activation=text.hidden_act,
        attention_bias=text.attention_bias if bias is None else bias,
        mlp_bias=getattr(text, "mlp_bias", False),
        qk_norm=kind == "qwen3",
        # What nests a decoder may say it for all of the model.
        tied_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
    )


def clip_vision_shape(vision: Any, file: Path) -> VisionShape:
    """Sizes of a CLIP vision config.

    Raises:
        CheckpointError: it is of another kind of tower.
    """
    kind = vision.model_type
    require(
        kind == "clip_vision_model",
        "vision model_type",
        kind,
        "clip_vision_model",
        where=file,
    )
    return VisionShape(
        **layer_sizes(vision),
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )


def layer_sizes(config: Any) -> dict[str, Any]:
    """What a CLIP config says of a tower's layers, for a ``TransformerShape``."""
    return {
        "width": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "layer_norm_eps": config.layer_norm_eps,
        "activation": config.hidden_act,
    }


def recipe_architecture(recipe: Recipe) -> Architecture:
    """The recipe's sizes, for checkpoints without a config.json that says them.

    Raises:
        RecipeError: it does not say them either.
    """
    if recipe.architecture is None:
        raise RecipeError(
            f"recipe {recipe.name} does not say the model's sizes",
            seen="no architecture",
            allowed="sizes of vision, projector and decoder: no config.json says them",
        )
    return recipe.architecture


def check_architecture(recipe: Recipe, architecture: Architecture, where: Path) -> None:
    """Refuse a checkpoint whose sizes are not those of the recipe.

    Raises:
        CheckpointError: with every size that differs.
    """
    vision = architecture.vision
    compare_facts(
        recipe,
        where,
        [
            ("image size", list(vision.canvas), [recipe.image.height, recipe.image.width]),
            (
                "visual token grid",
                list(architecture.token_grid),
                [recipe.grid.rows, recipe.grid.cols],
            ),
        ],
    )
    if recipe.architecture is None:
        return
    for part in ("vision", "projector", "decoder"):
        seen = dataclasses.asdict(getattr(architecture, part))
        wanted = dataclasses.asdict(getattr(recipe.architecture, part))
        keys = [key for key in wanted if key not in _FREE]
        compare_facts(recipe, where, [(f"{part} {key}", seen[key], wanted[key]) for key in keys])


def compare_facts(recipe: Recipe, where: Path, facts: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse what is not as the recipe has it: (what it is, value seen, value wanted).

    Raises:
        CheckpointError: facts differ; all of them are named.
    """
    wrong = [(what, seen, wanted) for what, seen, wanted in facts if seen != wanted]
    if wrong:
        raise CheckpointError(
            f"{where}: {', '.join(what for what, _, _ in wrong)} does not fit recipe {recipe.name}",
            seen=", ".join(reprlib.repr(seen) for _, seen, _ in wrong),
            allowed=", ".join(str(wanted) for _, _, wanted in wrong),
            fix="use a recipe written for this checkpoint",
        )


def select_index(recipe: Recipe, vision: VisionShape) -> int:
    """The select layer counted from the front: how many layers run.

    Raises:
        CheckpointError: the tower has no such layer.
    """
    # One more than layers: the first hidden state is what goes into the first layer.
    num_states = vision.num_layers + 1
    index = recipe.select_layer % num_states
    if not -num_states < recipe.select_layer < num_states or index == 0:
        raise CheckpointError(
            f"recipe {recipe.name}: the vision tower has no such select layer",
            seen=recipe.select_layer,
            allowed=f"1..{num_states - 1} or {1 - num_states}..-1",
        )
    return index


def eos_token_ids(recipe: Recipe, text: Any, generation: Path) -> tuple[int, ...]:
    """Ids that end an answer: the recipe's, else generation_config.json's, else the config's.

    Raises:
        CheckpointError: none of them is an id of the vocabulary.
    """
    if recipe.end_of_answer:
        return tuple(recipe.special_tokens[name] for name in recipe.end_of_answer)
    plain = read_json_object(generation) if generation.is_file() else {}
    # The classes of some configs have none of their own.
    eos = plain.get("eos_token_id", getattr(text, "eos_token_id", None))
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(type(i) is int and 0 <= i < text.vocab_size for i in ids):
        raise CheckpointError(
            "no usable eos_token_id in generation_config.json or config.json",
            seen=reprlib.repr(eos),
            allowed=f"ids in 0..{text.vocab_size - 1}",
        )
    return ids
