"""Reads MiniGPT-v2 as published: what was trained in one ``.pth``, its two halves elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gap_export.checkpoint.find.source import MAIN, Checkpoint
from gap_export.checkpoint.tokenizers.tokenizer_json import read_tokenizer
from gap_export.checkpoint.weights import Weight, filled, index_pickle, merge_lora
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.configs import check_architecture, recipe_architecture
from gap_export.families.common.checkpoints.matching import KeyLayout, main_dtype, match_tensors
from gap_export.families.common.checkpoints.parts import (
    LanguageModel,
    Stored,
    check_base,
    end_of_answer,
    read_language_model,
)
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.families.minigpt_v2.eva_checkpoint import read_eva_tower
from gap_export.spec.architecture import Architecture
from gap_export.spec.recipe import Recipe

logger = logging.getLogger(__name__)

BASE, TOWER = "base", "tower"
_SUFFIXES = (".pth", ".pt", ".bin")
_ENTRY = "model"
_PROJECTOR = "llama_proj.weight"
# No config.json speaks of the whole model.
_SIZES_OF = "the recipe"
# peft's names around Llama's own.
_ADAPTED = "llama_model.base_model.model.model."
# No file says it: of the training's configuration.
_LORA_ALPHA = 16


class _PeftKeys(KeyLayout):
    """Newer versions of peft name the adapter, which is the default one."""

    def canonical(self, key: str) -> str:
        return key.replace(".default.weight", ".weight")


_KEYS = _PeftKeys(prefixes=())


@dataclass(frozen=True, kw_only=True)
class MiniGptV2Layout:
    """Three parts: the trained weights, Llama-2-7b-chat (``base``) and EVA's ViT-g (``tower``).

    The file of trained weights holds the projector and LoRA adapters for queries and values, which
    are merged into the base with a scale of 16 / rank (0.25 at the published rank of 64). The norm
    behind the tower, ``ln_vision``, may be in there; the published file is without it, and then it
    is what it was initialized to: weight 1, bias 0. No config.json speaks of the whole model, so
    its sizes are the recipe's, and every tensor is checked against them.
    """

    name: str = "minigpt-v2"

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """A pickle with the projector in it, or one that cannot be read (which read() reports)."""
        file = checkpoint.main
        if not file.is_file() or file.suffix not in _SUFFIXES:
            return False
        try:
            return _PROJECTOR in index_pickle(file, entry=_ENTRY)
        except CheckpointError:
            return True

    def read(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        expected: Expected,  # noqa: ARG002 - each part is held against its own
    ) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        architecture, file = recipe_architecture(recipe), checkpoint.main
        eos = end_of_answer(recipe)
        check_architecture(recipe, architecture, file)
        trained = _trained(file, architecture)
        tower_file = checkpoint.part(TOWER, recipe)
        tower = read_eva_tower(tower_file, architecture.vision)
        base = read_language_model(checkpoint.part(BASE, recipe))
        check_base(base, architecture.decoder, recipe, role=BASE)
        weights: dict[str, Weight] = {
            **tower,
            "tower.post_layernorm.weight": trained["ln_vision.weight"],
            "tower.post_layernorm.bias": trained["ln_vision.bias"],
            "projector.linear_1.weight": trained[_PROJECTOR],
            "projector.linear_1.bias": trained["llama_proj.bias"],
            **_merged(base, trained, architecture),
        }
        return ModelSource(
            layout=self.name,
            architecture=architecture,
            weights=weights,
            dtype=main_dtype(weights),
            eos_token_ids=eos,
            image_token_id=None,
            tokenizer=read_tokenizer(base.folder, recipe),
            files=(
                (MAIN, file),
                *((BASE, path) for path in base.files),
                (TOWER, tower_file),
            ),
        )


def _trained(file: Path, architecture: Architecture) -> dict[str, Weight]:
    """All tensors of the trained part, ``ln_vision`` included whether it is there or not."""
    found = index_pickle(file, entry=_ENTRY)
    expected = _expected(architecture, rank=_rank(found, file))
    width = architecture.vision.width
    norm = {"ln_vision.weight": (width,), "ln_vision.bias": (width,)}
    if any(key in found for key in norm):
        return dict(match_tensors(found, expected | norm, _KEYS, where=file, sizes_of=_SIZES_OF))
    matched = match_tensors(found, expected, _KEYS, where=file, sizes_of=_SIZES_OF)
    logger.debug("%s holds no ln_vision: weight 1, bias 0", file)
    dtype = matched[_PROJECTOR].dtype
    return {
        **matched,
        "ln_vision.weight": filled((width,), 1.0, dtype),
        "ln_vision.bias": filled((width,), 0.0, dtype),
    }


def _rank(found: Mapping[str, Stored], file: Path) -> int:
    """The first adapter's rank; shapes are checked against it."""
    shapes = [ref.shape for key, ref in found.items() if ".lora_A." in key]
    if not shapes or not shapes[0] or not shapes[0][0]:
        raise CheckpointError(
            f"{file} holds no LoRA adapter",
            seen=f"shape {list(shapes[0])}" if shapes else f"{len(found)} other tensors",
            allowed="lora_A and lora_B of q_proj and v_proj in every layer",
            fix="use a checkpoint of MiniGPT-v2's second or third stage",
        )
    return shapes[0][0]


def _expected(architecture: Architecture, *, rank: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by the file's names."""
    decoder, projector = architecture.decoder, architecture.projector
    expected: dict[str, tuple[int, ...]] = {
        _PROJECTOR: (projector.hidden_size, projector.width),
        "llama_proj.bias": (projector.hidden_size,),
    }
    heads = {"q_proj": decoder.num_heads, "v_proj": decoder.num_key_value_heads}
    for index in range(decoder.num_layers):
        for name, num_heads in heads.items():
            prefix = f"{_ADAPTED}layers.{index}.self_attn.{name}"
            expected[f"{prefix}.lora_A.weight"] = (rank, decoder.hidden_size)
            expected[f"{prefix}.lora_B.weight"] = (num_heads * decoder.head_dim, rank)
    return expected


def _merged(
    base: LanguageModel, trained: Mapping[str, Weight], architecture: Architecture
) -> dict[str, Weight]:
    """The base's weights with the adapters in them."""
    weights: dict[str, Weight] = dict(base.weights)
    for index in range(architecture.decoder.num_layers):
        for name in ("q_proj", "v_proj"):
            module = f"layers.{index}.self_attn.{name}"
            down = trained[f"{_ADAPTED}{module}.lora_A.weight"]
            up = trained[f"{_ADAPTED}{module}.lora_B.weight"]
            key = f"decoder.{module}.weight"
            weights[key] = merge_lora(weights[key], down, up, _LORA_ALPHA / down.shape[0])
    return weights
