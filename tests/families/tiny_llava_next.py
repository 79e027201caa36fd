"""A random LLaVA-1.6 in the layout transformers saves, with either of its two decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from tests.conftest import VOCABULARY, _randomise, _write_tokenizer

TILE = 32
GRID = 4
# (height, width), as of the real models but for the tile's size.
RESOLUTIONS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
IMAGE_TOKEN = 3


def write_llava_next(
    folder: Path, *, decoder: Literal["llama", "mistral"] = "llama", seed: int = 0
) -> None:
    """Write config, weights, tokenizer and recipe: 32 px tiles of 4x4 tokens, 2 decoder layers."""
    from transformers import GenerationConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=_vision_config(),
        text_config=_decoder_config(decoder),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=RESOLUTIONS,
        vision_feature_layer=-2,
    )
    model = LlavaNextForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    _randomise(model, generator)
    # As large as other embeddings, so that a newline in the wrong place shows.
    with torch.no_grad():
        model.model.image_newline.copy_(torch.randn(32, generator=generator))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    _write_tokenizer(folder / "tokenizer.json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain_recipe()))


def plain_recipe() -> dict[str, Any]:
    """The recipe, to be changed by a test."""
    return {
        "name": "tiny-next",
        "family": "llava_next",
        "summary": "random weights, for tests",
        "license": "Apache-2.0",
        "checkpoint": {"kind": "bundled"},
        "select_layer": -2,
        "grid": {"rows": GRID, "cols": GRID},
        "image": {
            "height": TILE,
            "width": TILE,
            "preparation": "anyres",
            "pad_color": [0, 0, 0],
            "resample": "bicubic",
            "mean": [0.48, 0.46, 0.41],
            "std": [0.27, 0.26, 0.28],
            "tiles": {"resolutions": RESOLUTIONS},
        },
        "prompt": {
            "template": "USER: <image> {expression} ASSISTANT:",
            "question": {"start": "USER:", "end": "ASSISTANT:", "image": "<image>"},
            "image_token": "<image>",
            "max_expression_tokens": 16,
            "max_new_tokens": 8,
        },
        "box": {"syntax": "bracketed", "scale": 1.0, "frame": "image"},
        "text_tower": None,
        "defaults": {"pruner": "spatial", "keep_ratio": 0.3},
    }


def _vision_config() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=TILE // GRID,
        projection_dim=16,
    )


def _decoder_config(decoder: str) -> Any:
    """Vicuna's attention and RoPE, or Mistral-7B-v0.2's: fewer key-value heads, theta 1e6."""
    from transformers import LlamaConfig, MistralConfig

    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if decoder == "llama":
        return LlamaConfig(**sizes, num_key_value_heads=4)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return MistralConfig(
        **sizes, num_key_value_heads=1, head_dim=16, sliding_window=None, rope_parameters=rope
    )
