"""LLaVAs of true shape and random fp16 weights, sharded and named as llava-hf's."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

NUM_SHARDS = 3
_STD = 0.02
_BLOCK = 1 << 24
_VOCABULARY = 32064
_VISION_WIDTH, _VISION_INNER, _VISION_LAYERS, _PATCHES = 1024, 4096, 24, 576


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """A Llama decoder's sizes."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


LLAVA_7B = DecoderSizes(width=4096, inner=11008, layers=32, heads=32, kv_heads=32)


def config_of(sizes: DecoderSizes) -> dict[str, Any]:
    """config.json of a LLaVA with CLIP-L/14-336 and that decoder."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "hidden_size": sizes.width,
            "intermediate_size": sizes.inner,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "vocab_size": _VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": _VISION_WIDTH,
            "intermediate_size": _VISION_INNER,
            "num_hidden_layers": _VISION_LAYERS,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
    }


CONFIG = config_of(LLAVA_7B)


def write_checkpoint(folder: Path) -> bool:
    """Write it, or leave a complete one as it is.

    Returns:
        Whether anything had to be written.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(list(tensors_of(LLAVA_7B).items()))
    block = draw_block()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as stream:
            write_shard(stream, shard, block)
        weight_map |= dict.fromkeys((key for key, _ in shard), name)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    # Last, so that its presence says the rest is complete.
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    return True


def tensors_of(sizes: DecoderSizes) -> dict[str, tuple[int, ...]]:
    """Shapes of a LLaVA's weights by their names."""
    width, kv_width = sizes.width, sizes.width // sizes.heads * sizes.kv_heads
    shapes: dict[str, tuple[int, ...]] = {}
    tower = "vision_tower.vision_model."
    shapes[tower + "embeddings.class_embedding"] = (_VISION_WIDTH,)
    shapes[tower + "embeddings.patch_embedding.weight"] = (_VISION_WIDTH, 3, 14, 14)
    shapes[tower + "embeddings.position_embedding.weight"] = (_PATCHES + 1, _VISION_WIDTH)
    shapes |= _norm(tower + "pre_layrnorm", _VISION_WIDTH)
    for layer in range(_VISION_LAYERS):
        prefix = f"{tower}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{prefix}self_attn.{name}", _VISION_WIDTH, _VISION_WIDTH)
        shapes |= _norm(prefix + "layer_norm1", _VISION_WIDTH)
        shapes |= _linear(prefix + "mlp.fc1", _VISION_INNER, _VISION_WIDTH)
        shapes |= _linear(prefix + "mlp.fc2", _VISION_WIDTH, _VISION_INNER)
        shapes |= _norm(prefix + "layer_norm2", _VISION_WIDTH)
    shapes |= _norm(tower + "post_layernorm", _VISION_WIDTH)
    shapes |= _linear("multi_modal_projector.linear_1", width, _VISION_WIDTH)
    shapes |= _linear("multi_modal_projector.linear_2", width, width)
    shapes["language_model.model.embed_tokens.weight"] = (_VOCABULARY, width)
    for layer in range(sizes.layers):
        prefix = f"language_model.model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = kv_width if name in ("k_proj", "v_proj") else width
            shapes[f"{prefix}self_attn.{name}.weight"] = (rows, width)
        shapes[prefix + "mlp.gate_proj.weight"] = (sizes.inner, width)
        shapes[prefix + "mlp.up_proj.weight"] = (sizes.inner, width)
        shapes[prefix + "mlp.down_proj.weight"] = (width, sizes.inner)
        shapes[prefix + "input_layernorm.weight"] = (width,)
        shapes[prefix + "post_attention_layernorm.weight"] = (width,)
    shapes["language_model.model.norm.weight"] = (width,)
    shapes["language_model.lm_head.weight"] = (_VOCABULARY, width)
    return shapes


def _linear(name: str, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _split(
    tensors: list[tuple[str, tuple[int, ...]]],
) -> list[list[tuple[str, tuple[int, ...]]]]:
    total = sum(math.prod(shape) for _, shape in tensors)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(NUM_SHARDS)]
    done = 0
    for key, shape in tensors:
        shards[min(done * NUM_SHARDS // total, NUM_SHARDS - 1)].append((key, shape))
        done += math.prod(shape)
    return shards


def draw_block() -> NDArray[np.float16]:
    """Random values that weights are cut from."""
    return (np.random.default_rng(0).standard_normal(_BLOCK) * _STD).astype(np.float16)


def write_shard(
    stream: BinaryIO,
    tensors: list[tuple[str, tuple[int, ...]]],
    block: NDArray[np.float16] | None,
) -> None:
    """A safetensors file of these tensors.

    Args:
        stream: Where it goes.
        tensors: Names and shapes.
        block: Values that weights are cut from, so that writing is fast; rows of a large matrix
            then repeat. None draws every value, for models that are asked which token wins.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, shape in tensors:
        end = offset + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    stream.write(struct.pack("<Q", len(raw)) + raw)
    for number, (key, shape) in enumerate(tensors):
        count = math.prod(shape)
        if "norm" in key and key.endswith("weight"):
            stream.write(np.ones(count, np.float16).tobytes())
            continue
        if block is None:
            drawn = np.random.default_rng(number).standard_normal(count, np.float32) * _STD
            stream.write(drawn.astype(np.float16).tobytes())
            continue
        # Every tensor starts elsewhere in the block, so that no two are the same.
        shifted = np.roll(block, -7919 * number)
        for start in range(0, count, _BLOCK):
            stream.write(shifted[: min(_BLOCK, count - start)].tobytes())
