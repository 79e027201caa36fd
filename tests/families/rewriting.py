"""Checkpoints as they lie on other people's disks: other names, other dtypes, several files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

# What transformers 5 writes, the oldest form but for the tower, as (prefix, other version's).
TRANSFORMERS_4 = (("vision_tower.", "vision_tower.vision_model."),)
TRANSFORMERS_4_52 = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
)
TRANSFORMERS_5_IN_MEMORY = (
    *(pair for pair in TRANSFORMERS_4_52 if pair[0] != "vision_tower."),
    ("vision_tower.", "model.vision_tower."),
)


def rewrite(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy a checkpoint of one file, with other tensors in it."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    # Safetensors takes no views of one memory.
    tensors = {key: tensor.clone() for key, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def renamed(pairs: tuple[tuple[str, str], ...]) -> Callable[[Tensors], Tensors]:
    """Give each tensor the name that another version of transformers has for it."""

    def rename(key: str) -> str:
        found = [new + key.removeprefix(old) for old, new in pairs if key.startswith(old)]
        return found[0] if found else key

    return lambda tensors: {rename(key): tensor for key, tensor in tensors.items()}


def cast_to(dtypes: Mapping[str, torch.dtype]) -> Callable[[Tensors], Tensors]:
    """Cast tensors by the first of these prefixes that fits; '' fits all."""

    def cast(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(next(d for prefix, d in dtypes.items() if key.startswith(prefix)))

    return lambda tensors: {key: cast(key, tensor) for key, tensor in tensors.items()}


def shard(folder: Path, *, count: int) -> list[Path]:
    """Split the one file into several with an index, as llava-hf's repositories hold them."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    files = [folder / f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files):
        keys = list(tensors)[number::count]
        save_file({key: tensors[key] for key in keys}, file)
        weight_map |= dict.fromkeys(keys, file.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_index(folder, index)
    return files


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write a shard index."""
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
