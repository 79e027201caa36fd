"""Tiny LLaVA checkpoints in the layouts of their authors, made from one that transformers saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from gap_export.spec.recipe import CheckpointPart, CheckpointSource, HubRepository, Recipe
from tests.conftest import _write_tokenizer

Format = Literal["safetensors", "safetensors-sharded", "bin", "bin-sharded"]
State = dict[str, torch.Tensor]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PARTS = {
    "main": CheckpointPart(what="the tiny LLaVA"),
    "base": CheckpointPart(what="the tiny Llama it was trained on", required=False),
    "tower": CheckpointPart(
        what="the tiny CLIP", hub=HubRepository(id="tiny/clip"), required=False
    ),
}


def with_parts(recipe: Recipe) -> Recipe:
    """The recipe, with the parts that these layouts have."""
    return recipe.model_copy(update={"checkpoint": CheckpointSource(kind="local", parts=_PARTS)})


@dataclass(kw_only=True)
class Pieces:
    """A LLaVA taken apart; tests change it before writing.

    Attributes:
        language: ``model.*`` and ``lm_head.weight``, as of a ``LlamaForCausalLM``.
        projector: ``model.mm_projector.*``.
        tower: Names of ``CLIPVisionModel`` without a prefix.
        extra: ``model.image_newline`` of LLaVA-1.6.
        llm_config: Of the language model.
        vision_config: Of the tower.
        mm_config: The ``mm_*`` keys.
    """

    language: State
    projector: State
    tower: State
    extra: State = field(default_factory=dict)
    llm_config: dict[str, Any]
    vision_config: dict[str, Any]
    mm_config: dict[str, Any]


def take_apart(model: Any) -> Pieces:
    """The pieces of transformers' LLaVA or LLaVA-NeXT."""
    inner = model.model
    language = {f"model.{key}": tensor for key, tensor in inner.language_model.state_dict().items()}
    projector = inner.multi_modal_projector.state_dict()
    places = {"linear_1": "0", "linear_2": "2"}
    text = model.config.text_config.to_dict()
    newline = getattr(inner, "image_newline", None)
    rope = text.pop("rope_parameters")
    return Pieces(
        language={**language, "lm_head.weight": model.lm_head.weight.detach()},
        projector={
            f"model.mm_projector.{places[name]}.{kind}": tensor
            for key, tensor in projector.items()
            for name, kind in [key.split(".")]
        },
        tower=dict(inner.vision_tower.state_dict()),
        extra={} if newline is None else {"model.image_newline": newline.detach()},
        llm_config={**text, "rope_theta": rope["rope_theta"], "rope_scaling": None},
        vision_config=model.config.vision_config.to_dict(),
        mm_config={
            "mm_hidden_size": model.config.vision_config.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "image_aspect_ratio": "pad",
            "unfreeze_mm_vision_tower": False,
            "use_mm_proj": True,
        },
    )


def write_original(
    folder: Path,
    pieces: Pieces,
    *,
    form: Format = "safetensors",
    tower_inside: bool = False,
    model_type: str = "llava",
) -> Path:
    """A folder as liuhaotian/llava-v1.5-7b."""
    state = {**pieces.language, **pieces.projector, **pieces.extra}
    if tower_inside:
        state |= under("model.vision_tower.vision_tower.vision_model.", pieces.tower)
    # Old versions of transformers stored it.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_state(folder, state, form)
    write_json(
        folder / "config.json", {**pieces.llm_config, **pieces.mm_config, "model_type": model_type}
    )
    _write_tokenizer(folder / "tokenizer.json")
    return folder


def write_clip(folder: Path, pieces: Pieces, *, form: Format = "safetensors") -> Path:
    """A folder as openai/clip-vit-large-patch14-336: a whole CLIP."""
    from transformers import CLIPTextConfig

    others = {
        "text_model.embeddings.token_embedding.weight": torch.ones(9, 8),
        "text_model.embeddings.position_ids": torch.arange(5)[None],
        "text_projection.weight": torch.ones(16, 8),
        "visual_projection.weight": torch.ones(16, 32),
        "logit_scale": torch.tensor(2.0),
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    write_state(folder, {**under("vision_model.", pieces.tower), **others}, form)
    text = CLIPTextConfig(hidden_size=8, num_attention_heads=2).to_dict()
    write_json(
        folder / "config.json",
        {"model_type": "clip", "vision_config": pieces.vision_config, "text_config": text},
    )
    return folder


def write_base(folder: Path, pieces: Pieces, *, form: Format = "safetensors") -> Path:
    """A folder as lmsys/vicuna-7b-v1.5."""
    write_state(folder, pieces.language, form)
    write_json(folder / "config.json", {**pieces.llm_config, "model_type": "llama"})
    _write_tokenizer(folder / "tokenizer.json")
    return folder


def make_adapters(
    pieces: Pieces, *, rank: int, seed: int = 5, targets: tuple[str, ...] = LINEARS
) -> State:
    """Random adapters: ``model.layers.N.*.{A,B}`` for each target."""
    generator = torch.Generator().manual_seed(seed)
    adapters: State = {}
    for key, weight in pieces.language.items():
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            rows, columns = weight.shape
            adapters[f"{module}.A"] = torch.randn(rank, columns, generator=generator) * 0.3
            adapters[f"{module}.B"] = torch.randn(rows, rank, generator=generator) * 0.3
    return adapters


def write_lora(
    folder: Path,
    pieces: Pieces,
    adapters: Mapping[str, torch.Tensor],
    *,
    form: Literal["safetensors", "bin"] = "bin",
    infix: str = "",
    prefix: str = "base_model.model.",
    **adapter_config: Any,
) -> Path:
    """A folder as liuhaotian/llava-v1.5-7b-lora, without base and tower."""
    halves = {
        f"base_model.model.{key[:-2]}.lora_{key[-1]}{infix}.weight": tensor
        for key, tensor in adapters.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    if form == "bin":
        torch.save(halves, folder / "adapter_model.bin")
    else:
        save_file(halves, folder / "adapter_model.safetensors")
    torch.save(under(prefix, pieces.projector), folder / "non_lora_trainables.bin")
    write_json(
        folder / "config.json", {**pieces.llm_config, **pieces.mm_config, "model_type": "llava"}
    )
    defaults = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": list(LINEARS),
        "task_type": "CAUSAL_LM",
    }
    write_json(folder / "adapter_config.json", {**defaults, **adapter_config})
    return folder


def merged(state: State, adapters: Mapping[str, torch.Tensor], scale: float) -> State:
    """The language model with its adapters, by plain torch."""
    result = dict(state)
    for key, down in adapters.items():
        if key.endswith(".A"):
            module = key.removesuffix(".A")
            up = adapters[f"{module}.B"]
            result[f"{module}.weight"] = state[f"{module}.weight"] + scale * (up @ down)
    return result


def write_state(folder: Path, state: State, form: Format) -> None:
    """Write tensors, in two files where sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    # One storage may not be two tensors of a safetensors file.
    state = {key: tensor.detach().clone() for key, tensor in state.items()}
    suffix = form.partition("-")[0]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if not form.endswith("-sharded"):
        _save(state, folder / f"{stem}.{suffix}")
        return
    keys = sorted(state)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        _save({key: state[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})


def under(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    """A state dict with a prefix before each name."""
    return {prefix + key: tensor for key, tensor in state.items()}


def write_json(file: Path, plain: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(plain))


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``...`` removes one."""
    plain = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: value for key, value in plain.items() if value is not ...})


def _save(state: State, file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(state, file)
    else:
        save_file(state, file)
