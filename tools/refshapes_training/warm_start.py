"""Starting one demo model from another: what a pre-trained LLM and tower are to a full-size model.

Shape letters: G patches along a side.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from gap_export.evaluation.refshapes import generate_scene
from refshapes_training.designs import DESIGNS, Design
from refshapes_training.model import RefShapesModel
from refshapes_training.towers import VisionTower
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
    for name in ("layers", "norm"):
        theirs = getattr(other.decoder, name).state_dict()
        getattr(model.decoder, name).load_state_dict(theirs)
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
def _resize_tower(tower: VisionTower, other: VisionTower) -> None:
    """Layers as they are; patches and positions of another size; the norm in front folded in.

    That norm divides each patch by its own spread; the mean spread stands for it here, which is
    near enough to train on from.
    """
    tower.encoder.load_state_dict(other.encoder.state_dict())
    tower.post_layernorm.load_state_dict(other.post_layernorm.state_dict())
    mine, theirs = tower.embeddings, other.embeddings
    norm = other.pre_layrnorm
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
    size = (design.patch_size, design.patch_size)
    weight = functional.interpolate(
        theirs.patch_embedding.weight, size=size, mode="bicubic", antialias=False
    )
    weight *= (other.design.patch_size / design.patch_size) ** 2
    mine.patch_embedding.weight.copy_(folded(weight.flatten(1)).view_as(weight))
    assert mine.patch_embedding.bias is not None
    mine.patch_embedding.bias.copy_(norm.bias)
    table = theirs.position_embedding.weight
    side, old = design.patch_side, other.design.patch_side
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
