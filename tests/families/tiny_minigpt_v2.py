"""A random MiniGPT-v2 as published: trained .pth, Llama-2-chat's folder, eva_vit_g.pth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gap_export.spec.architecture import Architecture, DecoderShape, ProjectorShape, VisionShape
from gap_export.spec.recipe import Recipe, find_recipe
from tests.conftest import VOCABULARY, _randomise, _write_tokenizer
from tests.families.llava_layouts import Format, State, write_json, write_state

SIDE, JOIN, WIDTH, HEADS, LAYERS, INNER = 8, 4, 16, 2, 2, 24
LLAMA = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
_PEFT = "llama_model.base_model.model.model.layers"


@dataclass(kw_only=True)
class TinyMiniGpt:
    """Float32 state dicts; tests change them before writing.

    Attributes:
        trained: Projector and adapters, by the names in the .pth.
        base: ``LlamaForCausalLM``.
        eva: One block more than the tower has, positions of a image of half the size.
        rank: Of the adapters.
    """

    trained: State
    base: State
    eva: State
    rank: int


def make_minigpt(*, rank: int = 64, seed: int = 0) -> TinyMiniGpt:
    """Draw one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA))
    _randomise(llama, generator)

    def draw(*shape: int, scale: float = 0.1) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    trained = {
        "llama_proj.weight": draw(32, JOIN * WIDTH, scale=0.2),
        "llama_proj.bias": draw(32),
    }
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            prefix = f"{_PEFT}.{layer}.self_attn.{name}"
            trained[f"{prefix}.lora_A.weight"] = draw(rank, 32, scale=0.3)
            trained[f"{prefix}.lora_B.weight"] = draw(32, rank, scale=0.3)
    base = {key: tensor.detach() for key, tensor in llama.state_dict().items()}
    return TinyMiniGpt(trained=trained, base=base, eva=_draw_eva(draw), rank=rank)


def write_trained(file: Path, state: State, *, more: dict[str, Any] | None = None) -> Path:
    """As the training's runner saves: beside the model what it needs to go on."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5}]}
    whole = {"model": state, "optimizer": optimizer, "config": {"run": {}}, "epoch": 3}
    torch.save({**whole, **(more or {})}, file)
    return file


def write_base(
    folder: Path, state: State, *, form: Format = "safetensors-sharded", **config: Any
) -> Path:
    """A folder as meta-llama/Llama-2-7b-chat-hf."""
    write_state(folder, state, form)
    write_json(folder / "config.json", {**LLAMA, "model_type": "llama", **config})
    _write_tokenizer(folder / "tokenizer.json")
    return folder


def write_parts(folder: Path, tiny: TinyMiniGpt) -> dict[str, Path]:
    """All three."""
    torch.save(tiny.eva, folder / "eva_vit_g.pth")
    return {
        "main": write_trained(folder / "minigptv2_checkpoint.pth", tiny.trained),
        "base": write_base(folder / "llama-2-chat", tiny.base),
        "tower": folder / "eva_vit_g.pth",
    }


def minigpt_recipe() -> Recipe:
    """The shipped recipe, with the sizes of the tiny one."""
    shipped, _ = find_recipe("minigpt-v2")
    plain = shipped.model_dump()
    plain |= {
        "name": "tiny-minigpt",
        "aliases": (),
        "grid": {"rows": SIDE, "cols": SIDE // JOIN},
        "special_tokens": {"<s>": 1, "</s>": 2},
        "architecture": None,
    }
    plain["image"] |= {"height": SIDE * 4, "width": SIDE * 4}
    plain["prompt"]["max_new_tokens"] = 8
    return Recipe.model_validate(plain).model_copy(update={"architecture": architecture()})


def vision_shape() -> VisionShape:
    """Of EVA."""
    return VisionShape(
        width=WIDTH,
        intermediate_size=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        layer_norm_eps=1e-6,
        activation="gelu",
        image_size=SIDE * 4,
        patch_size=4,
    )


def architecture() -> Architecture:
    """All sizes."""
    decoder = DecoderShape(
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
    )
    projector = ProjectorShape(width=JOIN * WIDTH, hidden_size=32, activation=None)
    return Architecture(vision=vision_shape(), projector=projector, decoder=decoder)


def tokens_by_hand(eva: State, pixels: torch.Tensor, ln_vision: State) -> torch.Tensor:
    """MiniGPT-v2's visual tokens before the projector, from the definitions: [I, N, 4 * D]."""
    hidden = norm_by_hand(hidden_by_hand(eva, pixels, num_blocks=LAYERS), ln_vision)[:, 1:]
    batch, patches, width = hidden.shape
    return hidden.reshape(batch, patches // 4, width * 4)


def norm_by_hand(hidden: torch.Tensor, ln_vision: State) -> torch.Tensor:
    """The norm behind the tower."""
    weight, bias = ln_vision["ln_vision.weight"], ln_vision["ln_vision.bias"]
    return torch.nn.functional.layer_norm(hidden, (WIDTH,), weight, bias, eps=1e-5)


def hidden_by_hand(eva: State, pixels: torch.Tensor, *, num_blocks: int) -> torch.Tensor:
    """What some blocks make of a image, CLS first: [I, 1 + G * G, D]."""
    hidden = torch.nn.functional.conv2d(
        pixels, eva["patch_embed.proj.weight"], eva["patch_embed.proj.bias"], stride=4
    )
    hidden = hidden.flatten(2).transpose(1, 2)
    hidden = torch.cat((eva["cls_token"].expand(len(hidden), -1, -1), hidden), dim=1)
    hidden = hidden + positions_by_hand(eva["pos_embed"])
    for index in range(num_blocks):
        hidden = _block_by_hand(block_of(eva, index), hidden)
    return hidden


def block_of(eva: State, index: int) -> State:
    """One block's tensors, by their names in it."""
    prefix = f"blocks.{index}."
    return {k.removeprefix(prefix): t for k, t in eva.items() if k.startswith(prefix)}


def positions_by_hand(table: torch.Tensor) -> torch.Tensor:
    """Position of CLS as it is, the grid resized: [1, 1 + G * G, D]."""
    old = int((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].reshape(1, old, old, WIDTH).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(SIDE, SIDE), mode="bicubic", align_corners=False
    )
    return torch.cat((table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def attention_by_hand(block: State, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused projections, no bias for keys: (weights [I, heads, T, T], values)."""
    count, length, _ = normed.shape
    nothing = torch.zeros(WIDTH)
    bias = torch.cat((block["attn.q_bias"], nothing, block["attn.v_bias"]))
    fused = normed @ block["attn.qkv.weight"].T + bias
    query, key, value = fused.reshape(count, length, 3, HEADS, WIDTH // HEADS).permute(
        2, 0, 3, 1, 4
    )
    scores = (query * (WIDTH // HEADS) ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1), value


def _block_by_hand(block: State, hidden: torch.Tensor) -> torch.Tensor:
    functional = torch.nn.functional

    def norm(name: str) -> torch.Tensor:
        weight, bias = block[f"{name}.weight"], block[f"{name}.bias"]
        return functional.layer_norm(hidden, (WIDTH,), weight, bias, eps=1e-6)

    weights, value = attention_by_hand(block, norm("norm1"))
    mixed = (weights @ value).transpose(1, 2).reshape(hidden.shape)
    hidden = hidden + mixed @ block["attn.proj.weight"].T + block["attn.proj.bias"]
    inner = functional.gelu(norm("norm2") @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
    return hidden + inner @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]


def llama_by_hand(tiny: TinyMiniGpt) -> Any:
    """Transformers' Llama whose q and v projections have the adapters beside them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(tiny.base, strict=True)
    for number, layer in enumerate(model.model.layers):
        for name in ("q_proj", "v_proj"):
            prefix = f"{_PEFT}.{number}.self_attn.{name}"
            down = tiny.trained[f"{prefix}.lora_A.weight"]
            up = tiny.trained[f"{prefix}.lora_B.weight"]

            def adapted(_module, inputs, output, down=down, up=up):
                return output + inputs[0] @ down.T @ up.T * (16 / tiny.rank)

            getattr(layer.self_attn, name).register_forward_hook(adapted)
    return model


def _draw_eva(draw: Any) -> State:
    eva = {
        "cls_token": draw(1, 1, WIDTH, scale=0.5),
        "pos_embed": draw(1, 1 + (SIDE // 2) ** 2, WIDTH, scale=0.5),
        "patch_embed.proj.weight": draw(WIDTH, 3, 4, 4, scale=0.2),
        "patch_embed.proj.bias": draw(WIDTH),
    }
    for index in range(LAYERS + 1):
        eva |= {
            f"blocks.{index}.{key}": tensor
            for key, tensor in {
                "norm1.weight": 1 + draw(WIDTH),
                "norm1.bias": draw(WIDTH),
                "attn.q_bias": draw(WIDTH),
                "attn.v_bias": draw(WIDTH),
                "attn.qkv.weight": draw(3 * WIDTH, WIDTH, scale=0.4),
                "attn.proj.weight": draw(WIDTH, WIDTH, scale=0.3),
                "attn.proj.bias": draw(WIDTH),
                "norm2.weight": 1 + draw(WIDTH),
                "norm2.bias": draw(WIDTH),
                "mlp.fc1.weight": draw(INNER, WIDTH, scale=0.3),
                "mlp.fc1.bias": draw(INNER),
                "mlp.fc2.weight": draw(WIDTH, INNER, scale=0.3),
                "mlp.fc2.bias": draw(WIDTH),
            }.items()
        }
    leftovers = {
        "norm.weight": draw(WIDTH),
        "norm.bias": draw(WIDTH),
        "head.weight": draw(5, WIDTH),
    }
    return {**eva, **leftovers, "head.bias": draw(5)}
