"""Starting one demo model from another: what a pre-trained LLM and tower are to a full-size model.

Shape letters: G patches along a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from gap_export.evaluation.refshapes import generate_scene
from refshapes_training.batching import collate_language, packed_mask
from refshapes_training.designs import DESIGNS, Design
from refshapes_training.language_stage import embed
from refshapes_training.model import RefShapesModel
from refshapes_training.qwen_tower import QwenTower
from refshapes_training.towers import PIXEL_STATISTICS, VisionTower
from refshapes_training.vocabulary import Vocabulary

_PROBE_IMAGES = 32


def start_from(model: RefShapesModel, models: Path) -> None:
    """Take over decoder, words, tower and text tower of the model that the design names.

    The projector is the model's own. A word keeps its embedding, and a coordinate those of the same
    value in the other's way of writing; what the other does not know is as it was drawn.

    Args:
        model: Freshly built.
        models: Folder of the demo models.
    """
    assert model.design.starts_from is not None
    folder = models / model.design.starts_from
    other = RefShapesModel(DESIGNS[model.design.starts_from])
    load_llava(other, folder)
    _copy_rows(model, other)
    model.decoder.norm.load_state_dict(other.decoder.norm.state_dict())
    # Biases, which Qwen2 has, stay zero; norms of queries and keys, which Qwen3 has, are set below.
    model.decoder.layers.load_state_dict(other.decoder.layers.state_dict(), strict=False)
    if model.design.decoder == "qwen3_vl":
        _set_head_norms(model, other)
    model.text.load_state_dict(other.text.state_dict())
    model.visual_projection.load_state_dict(other.visual_projection.state_dict())
    if model.design.tower == other.design.tower:
        model.vision_tower.load_state_dict(other.vision_tower.state_dict())
    else:
        _resize_tower(model.vision_tower, other.vision_tower)


def load_llava(model: RefShapesModel, folder: Path) -> None:
    """Load what export.py wrote of `refshapes-llava`."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder)
    inner = llava.model
    model.vision_tower.load_state_dict(inner.vision_tower.state_dict())
    model.decoder.load_state_dict(inner.language_model.state_dict())
    model.lm_head.load_state_dict(llava.lm_head.state_dict())
    theirs = inner.multi_modal_projector.state_dict()
    model.projector.load_state_dict(
        {key.replace("linear_1", "0").replace("linear_2", "2"): v for key, v in theirs.items()}
    )
    clip = folder / "clip"
    model.text.load_state_dict(load_file(clip / "model.safetensors"))
    weight = load_file(clip / "visual_projection.safetensors")["visual_projection.weight"]
    model.visual_projection.load_state_dict({"weight": weight})


@torch.no_grad()
def _copy_rows(model: RefShapesModel, other: RefShapesModel) -> None:
    """Rows of embeddings and head of tokens that mean the same in both vocabularies."""
    pairs = _matching_tokens(model.vocabulary, other.vocabulary)
    ours, theirs = (torch.tensor(side) for side in zip(*pairs, strict=True))
    for mine, source in (
        (model.decoder.embed_tokens.weight, other.decoder.embed_tokens.weight),
        (model.lm_head.weight, other.lm_head.weight),
    ):
        mine[ours] = source[theirs]


def _matching_tokens(ours: Vocabulary, theirs: Vocabulary) -> list[tuple[int, int]]:
    pairs = {ours.ids[text]: theirs.ids[text] for text in ours.tokens if text in theirs.ids}
    pairs[ours.asking[-1]] = theirs.asking[-1]
    leading = [
        [offset for slot, offset in zip(v.design.answer, v.offsets, strict=False) if slot.is_first]
        for v in (ours, theirs)
    ]
    for mine, source in reversed(list(zip(*leading, strict=True))):
        pairs |= {mine + step: source + step for step in range(101)}
    return sorted(pairs.items())


@torch.no_grad()
def _set_head_norms(model: RefShapesModel, other: RefShapesModel) -> None:
    """Give the norms of queries and keys the mean length that these have without them.

    The decoder is then near enough to the one it starts from to be trained on.
    """
    scenes = [generate_scene(split="train", seed=0, index=i) for i in range(_PROBE_IMAGES)]
    batch = collate_language(other.design, scenes)
    shown = other.vision_tower(batch.images, num_layers=other.vision_tower.num_layers_read)
    (visual,) = other.project(other.vision_tower.tokens(other.vision_tower.selected(shown)), ())
    embeds, position_ids = embed(other, batch, visual)
    mask = packed_mask(batch.segments, other.design.prefix_length)
    _, states = other.decode(embeds, position_ids, mask, ())
    pairs = zip(model.decoder.layers, other.decoder.layers, (embeds, *states[:-1]), strict=True)
    for mine, theirs, hidden in pairs:
        normal, attention = theirs.input_layernorm(hidden), theirs.self_attn
        for norm, linear in (
            (mine.self_attn.q_norm, attention.q_proj),
            (mine.self_attn.k_norm, attention.k_proj),
        ):
            heads = linear(normal).unflatten(2, (-1, attention.head_dim))
            norm.weight.fill_(heads.pow(2).mean(-1).sqrt().mean())


def _as_qwen(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's layer by the names of Qwen3-VL's block."""
    found = {}
    for leaf in ("weight", "bias"):
        found[f"attn.qkv.{leaf}"] = torch.cat(
            [layer[f"self_attn.{part}_proj.{leaf}"] for part in "qkv"]
        )
        for theirs, ours in (
            ("layer_norm1", "norm1"),
            ("layer_norm2", "norm2"),
            ("self_attn.out_proj", "attn.proj"),
            ("mlp.fc1", "mlp.linear_fc1"),
            ("mlp.fc2", "mlp.linear_fc2"),
        ):
            found[f"{ours}.{leaf}"] = layer[f"{theirs}.{leaf}"]
    return found


def _as_intern(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's layer by the names of InternViT's, whose layer scale stays as it is."""
    names = {
        "layer_norm1": "layernorm_before",
        "layer_norm2": "layernorm_after",
        "self_attn.out_proj": "attention.projection_layer",
        "self_attn": "attention",
    }
    found = {}
    for key, tensor in layer.items():
        old = next((name for name in names if key.startswith(f"{name}.")), None)
        found[key if old is None else names[old] + key[len(old) :]] = tensor
    return found


_LAYERS = {"eva": dict, "qwen3_vl": _as_qwen, "internvl": _as_intern}


@torch.no_grad()
def _resize_tower(tower: VisionTower | QwenTower, other: VisionTower) -> None:
    """Layers as they are; patches and positions of another size; the norm in front folded in.

    That norm divides each patch by its own spread; the mean spread stands for it here, which is
    near enough to train on from.
    """
    for mine, layer in zip(tower.layers, other.layers, strict=True):
        mine.load_state_dict(_LAYERS[tower.design.tower](layer.state_dict()), strict=False)
    tower.post_layernorm.load_state_dict(other.post_layernorm.state_dict())
    theirs, norm = other.embeddings, other.pre_layrnorm
    scenes = [generate_scene(split="train", seed=0, index=i) for i in range(_PROBE_IMAGES)]
    images = torch.stack([torch.from_numpy(scene.image) for scene in scenes])
    other.pre_layrnorm = torch.nn.Identity()
    spread = other(images, num_layers=0)[0][:, 1:].std(-1).mean()
    other.pre_layrnorm = norm
    scale = (norm.weight / spread)[:, None]

    def folded(table: Tensor) -> Tensor:
        """[D, n]: without its mean over D, scaled."""
        return (table - table.mean(0, keepdim=True)) * scale

    design: Design = tower.design
    embeddings = tower if isinstance(tower, QwenTower) else tower.embeddings
    patches: nn.Conv2d = embeddings.patch_embedding
    size = (design.patch_size, design.patch_size)
    weight = functional.interpolate(
        theirs.patch_embedding.weight, size=size, mode="bicubic", antialias=False
    )
    weight *= (other.design.patch_size / design.patch_size) ** 2
    # Pixels are divided by another deviation.
    spreads = [torch.tensor(PIXEL_STATISTICS[one.tower][1]) for one in (design, other.design)]
    weight *= (spreads[0] / spreads[1])[:, None, None]
    patches.weight.copy_(folded(weight.flatten(1)).view_as(weight))
    assert patches.bias is not None
    patches.bias.copy_(norm.bias)
    if isinstance(tower, QwenTower):
        return
    mine, table = tower.embeddings, theirs.position_embedding.weight
    side, old = design.patch_grid[0], other.design.patch_grid[0]
    grid = table[1:].T.reshape(1, -1, old, old)
    # Tables are shifted cyclically in training, so the edges have neighbours on the other side.
    around = functional.pad(grid, (old, old, old, old), mode="circular")
    larger = functional.interpolate(
        around, size=(3 * side, 3 * side), mode="bicubic", align_corners=False
    )[:, :, side : 2 * side, side : 2 * side]
    mine.position_embedding.weight[1:] = folded(larger.flatten(2)[0]).T
    cls = (theirs.class_embedding + table[0])[:, None]
    cls_spread = cls.std() / spread
    mine.class_embedding.copy_((folded(cls) / cls_spread)[:, 0] + norm.bias)
    mine.position_embedding.weight[0].zero_()
