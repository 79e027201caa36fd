"""Checkpoints that are one folder as transformers lays it out: config, weights, tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gap_export.checkpoint.find.source import MAIN
from gap_export.checkpoint.tokenizers.tokenizer_json import read_tokenizer
from gap_export.checkpoint.weights import Weight
from gap_export.families.common.checkpoints.configs import eos_token_ids
from gap_export.families.common.checkpoints.matching import main_dtype
from gap_export.families.common.reference import ModelSource
from gap_export.spec.architecture import Architecture
from gap_export.spec.recipe import Recipe


def source_of_folder(
    recipe: Recipe,
    folder: Path,
    config: Any,
    architecture: Architecture,
    weights: Mapping[str, Weight],
    *,
    layout: str,
    image_token_id: int,
    files: Iterable[Path],
    notes: tuple[str, ...] = (),
) -> ModelSource:
    """What such a folder holds, once its tensors have our names.

    Args:
        recipe: What the model is.
        folder: The checkpoint.
        config: Its config.json, parsed; ``text_config`` is the decoder's.
        architecture: All sizes.
        weights: By our names.
        layout: The layout's name.
        image_token_id: Of the token that stands for the image.
        files: Those that the tensors were found in.
        notes: What the user should know of the checkpoint.

    Raises:
        CheckpointError: no token ends an answer, or the tokenizer cannot be read.
    """
    generation = folder / "generation_config.json"
    read = [folder / "config.json", *([generation] if generation.is_file() else [])]
    read += sorted(set(files))
    return ModelSource(
        layout=layout,
        architecture=architecture,
        weights=weights,
        dtype=main_dtype(weights),
        eos_token_ids=eos_token_ids(recipe, config.text_config, generation),
        image_token_id=image_token_id,
        tokenizer=read_tokenizer(folder, recipe),
        files=tuple((MAIN, path) for path in read),
        notes=notes,
    )
