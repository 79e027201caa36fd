"""LLaVA trained with LoRA, as its authors publish it, e.g. liuhaotian/llava-v1.5-7b-lora.

Three parts: adapters and projector (``main``), the language model they belong to (``base``), and
OpenAI's vision tower (``tower``). The adapters are merged as each matrix is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gap_export.checkpoint.find.hub_cache import ADAPTER_CONFIG
from gap_export.checkpoint.find.source import MAIN, Checkpoint
from gap_export.checkpoint.weights import index_pickle
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.lora import merge_adapter
from gap_export.families.common.checkpoints.parts import Stored, check_base, read_language_model
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.families.llava.original import (
    KEYS,
    TRAINED_FILE,
    assemble_original,
    is_adapter,
    is_original,
    read_original_config,
)
from gap_export.spec.recipe import Recipe

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class LlavaLoraLayout:
    """Adapters, a projector, and parts ``base`` and ``tower``.

    Attributes:
        newline: Whether the family has tiles, and the vector that ends their rows.
    """

    name: str
    newline: bool = False

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """By an adapter's config beside an original LLaVA's."""
        folder = checkpoint.main
        return is_adapter(folder) and is_original(folder, newline=self.newline)

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        folder = checkpoint.main
        trained = _index_trained(folder)
        base = read_language_model(checkpoint.part(BASE, recipe))
        config = read_original_config(
            recipe, folder, num_tensors=len(base.weights), newline=self.newline
        )
        # Training may have given the vocabulary more rows, which are then among the trained.
        wanted = replace(config.decoder, vocab_size=base.shape.vocab_size)
        check_base(base, wanted, recipe, role=BASE)
        found = {**base.weights, **trained}
        merged = merge_adapter(folder, found, KEYS)
        trained_files = sorted({weight.file for weight in trained.values()})
        return assemble_original(
            recipe,
            checkpoint,
            config,
            {**found, **merged.weights},
            expected,
            layout=self.name,
            files=[
                *((MAIN, file) for file in (*merged.files, *trained_files)),
                *((BASE, file) for file in base.files),
            ],
            tokenizers=[folder, base.folder],
        )


def _index_trained(folder: Path) -> dict[str, Stored]:
    """What was trained as a whole, by our names: the projector, and what replaces a weight."""
    file = folder / TRAINED_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds no projector",
            seen=f"no {TRAINED_FILE}",
            allowed=f"{ADAPTER_CONFIG}, the adapter's weights and {TRAINED_FILE}",
            fix="download all files of the checkpoint",
        )
    found: dict[str, Stored] = {}
    for key, weight in index_pickle(file).items():
        name = key.removeprefix("base_model.model.")
        # One wrapping class more or less, by the version of the training code.
        name = name.removeprefix("model.") if name.startswith("model.model.") else name
        ours = KEYS.canonical(name)
        if ours in found:
            raise CheckpointError(
                f"{file}: two names for one tensor", seen=f"{found[ours].origin} and {key}"
            )
        found[ours] = weight
    return found
