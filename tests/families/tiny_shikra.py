"""A random Shikra as published: a float16 delta, the LLaMA it is to, and a whole CLIP."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gap_export.spec.recipe import Recipe, find_recipe
from tests.conftest import VOCABULARY, _randomise, _write_tokenizer
from tests.families.llava_layouts import Format, State, write_json, write_state

BASE_VOCAB = len(VOCABULARY)
ADDED = ("<im_patch>", "<im_start>", "<im_end>")
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
_CLIP_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
_CLIP_TEXT = {
    "vocab_size": BASE_VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "projection_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(kw_only=True)
class TinyShikra:
    """Float16 numbers; tests change them before writing.

    Attributes:
        base: ``LlamaForCausalLM`` of the first vocabulary.
        vicuna: ``base``, trained further.
        delta: Trained model minus ``base``, and the projector.
        trained: Delta plus base, added by hand: what a reader must come to.
        clip: transformers' whole CLIP, float32.
        config: Of the delta.
    """

    base: State
    vicuna: State
    delta: State
    trained: State
    clip: Any
    config: dict[str, Any] = field(
        default_factory=lambda: {
            **LLAMA,
            "architectures": ["ShikraLlamaForCausalLM"],
            "model_type": "shikra",
            "mm_vision_tower": "openai/clip-vit-large-patch14",
            "mm_vision_select_layer": -2,
            "mm_use_im_start_end": True,
            "mm_hidden_size": 24,
            # As published, and wrong.
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": -1,
            "vocab_size": BASE_VOCAB + len(ADDED),
        }
    )


def make_shikra(*, seed: int = 0) -> TinyShikra:
    """Draw one. Training changes each weight by some percent, as it does in fact."""
    from transformers import CLIPModel, LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    base_model = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=BASE_VOCAB))
    _randomise(base_model, generator)
    base = {key: tensor.detach().half() for key, tensor in base_model.state_dict().items()}

    def train(state: State) -> State:
        return {key: _changed(tensor, generator) for key, tensor in state.items()}

    vicuna = train(base)
    rows = {
        key: torch.randn(len(ADDED), 32, generator=generator).mul(0.5).half()
        for key in ("model.embed_tokens.weight", "lm_head.weight")
    }
    target = train(vicuna)
    delta = {key: tensor - base[key] for key, tensor in target.items()}
    delta |= {key: torch.cat((delta[key], more)) for key, more in rows.items()}
    delta["model.mm_projector.weight"] = torch.randn(32, 24, generator=generator).mul(0.2).half()
    delta["model.mm_projector.bias"] = torch.randn(32, generator=generator).mul(0.1).half()
    clip = CLIPModel(clip_config()).eval()
    _randomise(clip, generator)
    return TinyShikra(
        base=base, vicuna=vicuna, delta=delta, trained=add_by_hand(delta, base), clip=clip
    )


def clip_config(**vision: Any) -> Any:
    """Of a whole CLIP, with other values for its vision tower."""
    from transformers import CLIPConfig

    return CLIPConfig(
        vision_config={**_CLIP_VISION, **vision}, text_config=_CLIP_TEXT, projection_dim=16
    )


def add_by_hand(delta: State, base: State) -> State:
    """Delta plus base as Shikra's own tool adds them."""
    total = {key: tensor.clone() for key, tensor in delta.items()}
    for key, tensor in base.items():
        total[key][: len(tensor)] += tensor
    return total


def write_shikra(
    folder: Path,
    tiny: TinyShikra,
    *,
    state: State | None = None,
    form: Format = "bin-sharded",
    with_tokenizer: bool = False,
) -> Path:
    """The main part; ``state`` instead of the delta."""
    state = tiny.delta if state is None else state
    frequencies = {
        f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in (0, 1)
    }
    write_state(folder, {**state, **frequencies}, form)
    write_json(folder / "config.json", tiny.config)
    if with_tokenizer:
        _write_tokenizer(folder / "tokenizer.json")
        write_json(folder / "added_tokens.json", added_tokens())
    return folder


def write_llama(folder: Path, state: State, *, form: Format = "safetensors", **config: Any) -> Path:
    """A Llama's folder."""
    write_state(folder, state, form)
    vocabulary = {"vocab_size": len(state["lm_head.weight"]), "model_type": "llama"}
    write_json(folder / "config.json", {**LLAMA, **vocabulary, **config})
    _write_tokenizer(folder / "tokenizer.json")
    return folder


def write_clip(folder: Path, clip: Any) -> Path:
    """A folder as openai/clip-vit-large-patch14."""
    clip.save_pretrained(folder)
    _write_tokenizer(folder / "tokenizer.json")
    return folder


def write_parts(folder: Path, tiny: TinyShikra) -> dict[str, Path]:
    """All three."""
    return {
        "main": write_shikra(folder / "shikra-delta", tiny),
        "base": write_llama(folder / "llama-7b", tiny.base),
        "tower": write_clip(folder / "clip", tiny.clip),
    }


def added_tokens() -> dict[str, int]:
    """Ids of the tokens that Shikra added."""
    return {text: BASE_VOCAB + number for number, text in enumerate(ADDED)}


def shikra_recipe() -> Recipe:
    """The shipped recipe, with the sizes of the tiny one; its architecture left to the configs."""
    shipped, _ = find_recipe("shikra-7b")
    plain = shipped.model_dump()
    plain |= {
        "name": "tiny-shikra",
        "aliases": (),
        "architecture": None,
        "grid": {"rows": 4, "cols": 4},
        "special_tokens": {"<s>": 1, "</s>": 2, **added_tokens()},
    }
    plain["image"] |= {"height": 32, "width": 32}
    plain["prompt"]["max_new_tokens"] = 8
    plain["text_tower"]["shape"] = None
    # A merged model needs none.
    plain["checkpoint"]["parts"]["base"]["required"] = False
    return Recipe.model_validate(plain)


def llama_of(state: State) -> nn.Module:
    """Transformers' Llama in float32, with these numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA, vocab_size=len(state["lm_head.weight"]))
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    own = {key: tensor.float() for key, tensor in state.items() if "mm_projector" not in key}
    model.load_state_dict(own, strict=True)
    return model


def _changed(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    size = tensor.float().std() if tensor.ndim > 1 else 0.1
    return (tensor.float() + torch.randn(tensor.shape, generator=generator) * size * 0.03).half()
