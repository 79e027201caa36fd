"""A Qwen3-VL of true shape and random fp16 weights, named as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export_bench.checkpoint import draw_block, write_shard

_FILE = "model.safetensors"


def write_qwen(folder: Path, name: str) -> bool:
    """Write a checkpoint of a recipe's sizes, or leave a complete one as it is.

    Returns:
        Whether anything had to be written.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from gap_export.families.common.checkpoints.random_weights import stand_in_tokenizer
    from gap_export.spec.recipe import find_recipe

    if (folder / "config.json").is_file():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    recipe, _ = find_recipe(name)
    plain = _config(recipe.architecture, recipe.special_tokens["<|image_pad|>"])
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(plain))
    tied = plain["tie_word_embeddings"]
    shapes = [
        (key, tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    ]
    with (folder / _FILE).open("wb") as stream:
        write_shard(stream, shapes, draw_block())
    tokenizer = stand_in_tokenizer(plain["text_config"]["vocab_size"], dict(recipe.special_tokens))
    (folder / "tokenizer.json").write_bytes(tokenizer)
    # Last, so that its presence says the rest is complete.
    (folder / "config.json").write_text(json.dumps(plain, indent=2))
    return True


def _config(shapes: Any, image_token_id: int) -> dict[str, Any]:
    """config.json of these sizes."""
    vision, decoder = shapes.vision, shapes.decoder
    rope = {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": list(decoder.rope_sections),
    }
    return {
        "model_type": "qwen3_vl",
        "image_token_id": image_token_id,
        "tie_word_embeddings": decoder.tied_embeddings,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_key_value_heads,
            "head_dim": decoder.head_dim,
            "vocab_size": decoder.vocab_size,
            "max_position_embeddings": decoder.max_position_embeddings,
            "rms_norm_eps": decoder.rms_norm_eps,
            "rope_theta": decoder.rope_theta,
            "rope_scaling": rope,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": vision.num_layers,
            "hidden_size": vision.width,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "hidden_act": vision.activation,
            "patch_size": vision.patch_size,
            "out_hidden_size": decoder.hidden_size,
            "num_position_embeddings": vision.position_side**2,
            "deepstack_visual_indexes": list(vision.taps),
        },
    }
