"""Reads EVA's ViT-g as BLIP-2 published it: one pickle, ``eva_vit_g.pth``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from gap_export.checkpoint.weights import (
    DerivedWeight,
    Weight,
    filled,
    index_pickle,
    reshaped,
    rows,
)
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.matching import KeyLayout, match_tensors
from gap_export.spec.architecture import VisionShape

_AS_THEY_ARE = KeyLayout(prefixes=())
# No config.json comes with the file.
_SIZES_OF = "the recipe"
# What the tower was trained with and BLIP-2 does without.
_LEFTOVERS = ("norm.", "fc_norm.", "head.")
_LAYER_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def read_eva_tower(file: Path, shape: VisionShape) -> dict[str, Weight]:
    """Read the header of the pickle.

    The file has one block more than the tower, which was trained with it; that block and the
    classifier are left out, by name. Query, key and value are one matrix there and three here. Keys
    have no bias there: it is zero. Positions are those of a smaller image and are interpolated
    (bicubic), as the model's own code does.

    Args:
        file: A state dict, or a dict that holds one as ``model``.
        shape: The tower's sizes.

    Returns:
        ``tower.*`` but for ``tower.post_layernorm``, which is no part of EVA.

    Raises:
        CheckpointError: missing, damaged, or not exactly these tensors.
    """
    left_over = (*_LEFTOVERS, f"blocks.{shape.num_layers}.")
    found = {
        key: ref
        for key, ref in index_pickle(file, entry="model").items()
        if not key.startswith(left_over)
    }
    expected = _expected(shape, _num_positions(found.get("pos_embed"), file))
    theirs = match_tensors(found, expected, _AS_THEY_ARE, where=file, sizes_of=_SIZES_OF)
    width, embeddings = shape.width, "tower.embeddings."
    ours: dict[str, Weight] = {
        f"{embeddings}class_embedding": reshaped(theirs["cls_token"], (width,)),
        f"{embeddings}patch_embedding.weight": theirs["patch_embed.proj.weight"],
        f"{embeddings}patch_embedding.bias": theirs["patch_embed.proj.bias"],
        f"{embeddings}position_embedding.weight": interpolated_positions(
            reshaped(theirs["pos_embed"], theirs["pos_embed"].shape[1:]), shape.patch_grid[0]
        ),
    }
    for index in range(shape.num_layers):
        layer = _layer({k: theirs[f"blocks.{index}.{k}"] for k in _layer_shapes(shape)}, width)
        ours |= {f"tower.encoder.layers.{index}.{key}": weight for key, weight in layer.items()}
    return ours


def interpolated_positions(table: Weight, grid_size: int) -> Weight:
    """A table of positions for another size of image; the very weight where it fits already.

    Args:
        table: [1 + g * g, D], CLS first.
        grid_size: G, patches along one side of the new size.

    Returns:
        [1 + G * G, D], of the table's dtype.
    """
    old, width = math.isqrt(table.shape[0] - 1), table.shape[1]
    if old == grid_size:
        return table

    def compute(table: torch.Tensor) -> torch.Tensor:
        grid = table[1:].float().reshape(1, old, old, width).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            grid, size=(grid_size, grid_size), mode="bicubic", align_corners=False
        )
        patches = resized.permute(0, 2, 3, 1).reshape(grid_size * grid_size, width)
        return torch.cat((table[:1].float(), patches))

    return DerivedWeight(
        dtype=table.dtype,
        shape=(grid_size * grid_size + 1, width),
        sources=(table,),
        compute=compute,
        origin=f"{table.origin}, from {old}x{old} to {grid_size}x{grid_size} patches",
    )


def _num_positions(table: Weight | None, file: Path) -> int:
    """Rows of the table, which are those of CLS and a square; 1 + 1 where there is no table."""
    if table is None:
        return 2
    num_patches = table.shape[1] - 1 if len(table.shape) == 3 else 0
    if num_patches < 1 or math.isqrt(num_patches) ** 2 != num_patches:
        raise CheckpointError(
            f"{file}: pos_embed is no table of the positions of CLS and a square of patches",
            seen=f"shape {list(table.shape)}",
            allowed="[1, 1 + side * side, width]",
            fix="use EVA's ViT-g as published with BLIP-2",
        )
    return num_patches + 1


def _expected(shape: VisionShape, num_positions: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by the file's names."""
    width, patch = shape.width, shape.patch_size
    expected: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, num_positions, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for index in range(shape.num_layers):
        expected |= {f"blocks.{index}.{k}": size for k, size in _layer_shapes(shape).items()}
    return expected


def _layer_shapes(shape: VisionShape) -> dict[str, tuple[int, ...]]:
    width, inner = shape.width, shape.intermediate_size
    return {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.q_bias": (width,),
        "attn.v_bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }


def _layer(theirs: Mapping[str, Weight], width: int) -> dict[str, Weight]:
    """One block by CLIP's names."""
    fused = theirs["attn.qkv.weight"]
    ours: dict[str, Weight] = {
        f"self_attn.{name}_proj.weight": rows(fused, part * width, (part + 1) * width)
        for part, name in enumerate("qkv")
    }
    ours["self_attn.q_proj.bias"] = theirs["attn.q_bias"]
    ours["self_attn.k_proj.bias"] = filled((width,), 0.0, theirs["attn.q_bias"].dtype)
    ours["self_attn.v_proj.bias"] = theirs["attn.v_bias"]
    for their_name, our_name in _LAYER_NAMES.items():
        for leaf in ("weight", "bias"):
            ours[f"{our_name}.{leaf}"] = theirs[f"{their_name}.{leaf}"]
    return ours
