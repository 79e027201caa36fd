"""A random InternVL in either of its two forms, with either of its two kinds of decoder."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from tests.conftest import _randomise

Form = Literal["hf", "original"]
DecoderName = Literal["qwen2", "qwen3"]

TILE, PATCH = 32, 4
GRID = TILE // PATCH // 2
SYSTEM = "You are a tiny model."
# Behind the vocabulary, in this order; the last nine are InternVL's.
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>",
    "</quad>", "<ref>", "</ref>", "<box>", "</box>",
]  # fmt: skip
TEXT = "Please provide the bounding box coordinate of the region this sentence describes: a box"
# What Qwen2's tokenizers split text by before they look for merges.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def canvases(most: int, side: int = TILE) -> list[list[int]]:
    """(height, width) of every grid of at most so many tiles, smaller ones first."""
    grids = [(r, c) for c in range(1, most + 1) for r in range(1, most + 1) if r * c <= most]
    return [[r * side, c * side] for r, c in sorted(grids, key=lambda grid: grid[0] * grid[1])]


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """All bytes and some merges, learnt from a sentence."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def special_tokens() -> dict[str, int]:
    first = len(vocabulary()[0])
    return {text: first + place for place, text in enumerate(SPECIAL)}


def write_slow_tokenizer(folder: Path) -> None:
    """The files of InternVL3's own repositories: no tokenizer.json."""
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps(special_tokens()))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(token): {"content": text, "special": True, **flags}
        for text, token in special_tokens().items()
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": SPECIAL,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def their_tokenizer(folder: Path) -> Any:
    """Transformers' tokenizer of the same files."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(folder)


def write_internvl(
    folder: Path, *, decoder: DecoderName = "qwen2", form: Form = "hf", seed: int = 0, **recipe: Any
) -> None:
    """Write config, weights, tokenizer and recipe: 32 px tiles of 4x4 tokens, 2 decoder layers.

    Heads are 16 wide, which is the least that TensorRT fuses.

    Args:
        folder: It is made.
        decoder: Qwen2 with biases and RoPE that is dynamic, or Qwen3 with q/k norms and heads that
            are wider than the hidden size.
        form: As transformers saves it, or as the authors publish it.
        seed: Of the weights.
        recipe: Replaces entries of :func:`plain_recipe`.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration(_config(decoder))
    _randomise(model, torch.Generator().manual_seed(seed))
    _raise_scales(model)
    end = special_tokens()["<|im_end|>"]
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0)
    model.save_pretrained(folder)
    if form == "original":
        save_file(original_tensors(folder), folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(original_config(config)))
        (folder / "generation_config.json").unlink()
    write_slow_tokenizer(folder)
    if form == "hf":
        their_tokenizer(folder).save_pretrained(folder)
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain_recipe(**recipe), allow_unicode=True))


def plain_recipe(**changes: Any) -> dict[str, Any]:
    """The recipe, to be changed by a test."""
    recipe = {
        "name": "tiny-internvl",
        "family": "internvl",
        "summary": "random weights, for tests",
        "license": "Apache-2.0",
        "checkpoint": {"kind": "bundled"},
        "special_tokens": special_tokens(),
        "end_of_answer": ["<|im_end|>"],
        "select_layer": -1,
        "grid": {"rows": GRID, "cols": GRID},
        "image": {
            "height": TILE,
            "width": TILE,
            "preparation": "dynamic_tiles",
            "pad_color": [0, 0, 0],
            "resample": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "tiles": {"resolutions": canvases(6)},
        },
        "prompt": {
            "template": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>"
            "<IMG_CONTEXT></img>\nPlease provide the bounding box coordinate of the region this "
            "sentence describes: <ref>{expression}</ref><|im_end|>\n<|im_start|>assistant\n",
            "image_token": "<IMG_CONTEXT>",
            "max_expression_tokens": 64,
            "max_new_tokens": 8,
        },
        "box": {"syntax": "bracketed", "scale": 1000.0, "frame": "image"},
        "text_tower": None,
        "defaults": {"pruner": "spatial", "keep_ratio": 0.3},
    }
    return recipe | changes


def squashed(**changes: Any) -> dict[str, Any]:
    """``image`` of :func:`plain_recipe` without tiles."""
    image = plain_recipe()["image"] | {"preparation": "squash"}
    del image["tiles"]
    return {"image": image, **changes}


def original_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A saved model's tensors by the authors' names; q, k and v are one."""
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in found.items():
        name = key
        for theirs, ours in _ORIGINAL_NAMES:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [renamed.pop(key.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return {key: tensor.contiguous() for key, tensor in renamed.items()}


# Patterns of transformers' names, in order.
_ORIGINAL_NAMES = (
    (r"^vision_tower\.", "vision_model."),
    (r"cls_token", "class_embedding"),
    (r"position_embeddings", "position_embedding"),
    (r"patch_embeddings\.projection", "patch_embedding"),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"attention\.([qkv])_proj", r"attn.\1"),
    (r"attention\.projection_layer", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_(\d)", r"ls\1"),
    (r"^multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^multi_modal_projector\.linear_2", "mlp1.3"),
)


def original_config(config: dict[str, Any]) -> dict[str, Any]:
    """What the authors' config.json says of the same model, odd values included."""
    tower, text = config["vision_config"], dict(config["text_config"])
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    kind = rope["rope_type"]
    text["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
    # Its own tokens are not those that end an answer.
    text |= {"eos_token_id": special_tokens()["<|endoftext|>"], "bos_token_id": 0}
    text |= {"_name_or_path": "Qwen/Qwen2.5-32B-Instruct", "id2label": {"0": "LABEL_0"}}
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "layer_norm_eps", "hidden_act", "num_channels", "norm_type",
    )  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "vision_config": {
            **{key: tower[key] for key in same},
            "model_type": "intern_vit_6b",
            "image_size": tower["image_size"][0],
            "patch_size": tower["patch_size"][0],
            "qk_normalization": False,
            "qkv_bias": True,
            "use_flash_attn": True,
        },
        "llm_config": text,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "force_image_size": tower["image_size"][0],
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 12,
        "template": "internvl2_5",
        "system_message": None,
        "torch_dtype": "float32",
    }


def _config(decoder: DecoderName) -> Any:
    from transformers import InternVLConfig, Qwen2Config, Qwen3Config

    tokens = special_tokens()
    sizes = {
        "vocab_size": tokens["</box>"] + 1,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": tokens["<|im_end|>"],
        "tie_word_embeddings": False,
    }
    if decoder == "qwen2":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
        text: Any = Qwen2Config(**sizes, hidden_size=64, rope_parameters=rope)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6}
        text = Qwen3Config(**sizes, hidden_size=32, head_dim=16, rope_parameters=rope)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
    }
    return InternVLConfig(
        vision_config=tower,
        text_config=text.to_dict(),
        image_token_id=tokens["<IMG_CONTEXT>"],
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )


def _raise_scales(model: Any) -> None:
    """Layer scale of order 1, so that a tower without it shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda_" in name:
                parameter.add_(0.7)
