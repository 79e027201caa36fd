"""Random checkpoints of Qwen's models as published, and the same weights in transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from tests.conftest import _randomise

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PATCH, MERGE = 4, 2
TOKEN = PATCH * MERGE
WIDTH, HEADS, DEPTH = 32, 2, 4
SPECIAL = {
    "<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<|object_ref_start|>": 259,
    "<|object_ref_end|>": 260, "<|box_start|>": 261, "<|box_end|>": 262, "<|vision_start|>": 263,
    "<|vision_end|>": 264, "<|image_pad|>": 265, "<|video_pad|>": 266,
}  # fmt: skip
VOCAB = 272
IMAGE, VIDEO = SPECIAL["<|image_pad|>"], SPECIAL["<|video_pad|>"]
# Height and width in pixels. Windows of 16 px reach over the edges of the second and the third.
CANVASES = {"whole windows": (16, 48), "rows < cols": (24, 40), "rows > cols": (56, 24)}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_HEAD_DIM = 24
LICENSE_NOTE = "tests may use these weights, and nothing else"


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk.

    Attributes:
        family: Its name.
        folder: Holds config.json, model.safetensors, tokenizer.json and recipe.yaml.
        model: The same weights in transformers' class, float32.
    """

    family: str
    folder: Path
    model: Any


def make_tiny(
    family: str,
    folder: Path,
    *,
    canvas: tuple[int, int] = CANVASES["rows < cols"],
    old_names: bool = True,
    tied: bool = False,
    seed: int = 0,
) -> Tiny:
    """Write one.

    Args:
        family: One of :data:`FAMILIES`.
        folder: Made.
        canvas: Height and width in pixels, in the recipe alone.
        old_names: Tensors of Qwen2-VL and Qwen2.5-VL as on the hub, not as transformers saves them.
        tied: Whether the head is the word embeddings.
        seed: Of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(family, tied=tied, seed=seed)
    save_file(stored_names(family, model, old=old_names), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(plain_config(family, tied=tied)))
    ends = [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    write_tokenizer(folder / "tokenizer.json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain_recipe(family, canvas)))
    return Tiny(family=family, folder=folder, model=model)


def make_model(family: str, *, tied: bool = False, seed: int = 0) -> Any:
    """Transformers' model with random weights, eager attention."""
    import transformers

    classes = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    config = getattr(transformers, f"{classes[family]}Config").from_dict(
        plain_config(family, tied=tied)
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{classes[family]}ForConditionalGeneration")(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    # The only norm that is not called one.
    merger = model.model.visual.merger
    if hasattr(merger, "ln_q"):
        merger.ln_q.weight.data += 1
    if tied:
        model.tie_weights()
    return model.eval()


def stored_names(family: str, model: Any, *, old: bool) -> dict[str, torch.Tensor]:
    """Tensors by the names of files."""
    tied = model.config.tie_word_embeddings
    state = {
        key: tensor.detach().contiguous()
        for key, tensor in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    if family == "qwen3_vl" or not old:
        return state
    return {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for key, tensor in state.items()
    }


def plain_config(family: str, *, tied: bool = False) -> dict[str, Any]:
    """config.json as published: flat but for Qwen3-VL, ``rope_scaling`` of type mrope."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "bos_token_id": SPECIAL["<|endoftext|>"],
        "eos_token_id": SPECIAL["<|im_end|>"],
    }
    ids = {
        "model_type": family,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": SPECIAL["<|vision_start|>"],
        "vision_end_token_id": SPECIAL["<|vision_end|>"],
        "tie_word_embeddings": tied,
    }
    vision = {
        "model_type": family,
        "depth": DEPTH,
        "num_heads": HEADS,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
    }
    if family == "qwen3_vl":
        rope = {"mrope_interleaved": True, "mrope_section": [4, 4, 4], "rope_type": "default"}
        text |= {"model_type": "qwen3_vl_text", "head_dim": _HEAD_DIM, "attention_bias": False}
        text |= {"rope_theta": 5000.0, "rope_scaling": rope}
        vision |= {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "hidden_act": "gelu_pytorch_tanh",
            "out_hidden_size": 64,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 2],
        }
        return {**ids, "text_config": text, "vision_config": vision}
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    text |= {"rope_theta": 10000.0, "rope_scaling": rope, "use_sliding_window": False}
    text |= {"sliding_window": 64, "max_window_layers": 4}
    if family == "qwen2_5_vl":
        vision |= {
            "hidden_size": WIDTH,
            "intermediate_size": 44,
            "hidden_act": "silu",
            "out_hidden_size": 64,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1, 3],
        }
    else:
        vision |= {"embed_dim": WIDTH, "hidden_size": 64, "mlp_ratio": 2}
    return {**ids, **text, "vision_config": vision}


def plain_recipe(family: str, canvas: tuple[int, int]) -> dict[str, Any]:
    """The recipe, to be changed by a test."""
    height, width = canvas
    is_third = family == "qwen3_vl"
    return {
        "name": f"tiny-{family.replace('_', '-')}",
        "family": family,
        "summary": "random weights, for tests",
        "license": "Apache-2.0",
        "license_note": LICENSE_NOTE if family == "qwen2_5_vl" else None,
        "checkpoint": {"kind": "bundled"},
        "special_tokens": {name: SPECIAL[name] for name in ("<|im_end|>", "<|image_pad|>")},
        "select_layer": -1,
        "grid": {"rows": height // TOKEN, "cols": width // TOKEN},
        "image": {
            "height": height,
            "width": width,
            "preparation": "squash",
            "pad_color": [0, 0, 0],
            "resample": "bicubic",
            "mean": [0.5] * 3 if is_third else CLIP_MEAN,
            "std": [0.5] * 3 if is_third else CLIP_STD,
        },
        "prompt": {
            "template": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find "
            "{expression}.<|im_end|>\n<|im_start|>assistant\n",
            "image_token": "<|image_pad|>",
            "max_expression_tokens": 80,
            "max_new_tokens": 8,
        },
        "box": {"syntax": "bracketed", "scale": 1000, "frame": "image"},
        "text_tower": None,
        "defaults": {"pruner": "spatial", "keep_ratio": 0.3},
    }


def write_tokenizer(file: Path) -> None:
    """Bytes without merges, and the special tokens: it spells like Qwen's and knows no word."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    tokenizer.save(str(file))


def stand_in_prompt(folder: Path, expression: str) -> tuple[list[int], list[int]]:
    """Ids before and after the image, by the tokenizer alone."""
    from tokenizers import Tokenizer

    template = yaml.safe_load((folder / "recipe.yaml").read_text())["prompt"]["template"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before, after = template.replace("{expression}", expression).split("<|image_pad|>")
    return tokenizer.encode(before).ids, tokenizer.encode(after).ids


def patches_of(pixels: torch.Tensor, patch: int = PATCH) -> torch.Tensor:
    """What transformers' towers take: rows of two frames of a patch, four rows to a token.

    Args:
        pixels: [3, h, w].
        patch: Pixels of the side of a patch, p.

    Returns:
        [P, 3 * 2 * p * p].
    """
    channels, height, width = pixels.shape
    token = MERGE * patch
    blocks = pixels.reshape(
        channels, height // token, MERGE, patch, width // token, MERGE, patch
    ).permute(1, 4, 2, 5, 0, 3, 6)
    frames = blocks.unsqueeze(5).expand(*blocks.shape[:5], 2, patch, patch)
    return frames.reshape(-1, channels * 2 * patch * patch)


def tower_outputs(tiny: Tiny, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What transformers makes of images [I, 3, h, w].

    Returns:
        Merged tokens [I, N, H], and those of each tap.
    """
    _, _, height, width = pixels.shape
    grid = torch.tensor([[1, height // PATCH, width // PATCH]] * len(pixels))
    rows = torch.cat([patches_of(image) for image in pixels])
    with torch.inference_mode():
        found = tiny.model.model.visual(rows, grid_thw=grid)
    tokens = (height // TOKEN) * (width // TOKEN)
    taps = getattr(found, "deepstack_features", None) or []
    return found.pooler_output.reshape(len(pixels), tokens, -1), [
        tap.reshape(len(pixels), tokens, -1) for tap in taps
    ]
