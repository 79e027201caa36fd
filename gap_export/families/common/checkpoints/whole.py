"""One folder that holds a whole model under this package's own names, for any family.

The demo models of families whose published checkpoints come in parts are stored like this.
"""

from __future__ import annotations

from dataclasses import dataclass

from gap_export.checkpoint.find.source import MAIN, Checkpoint
from gap_export.checkpoint.tokenizers.tokenizer_json import read_tokenizer
from gap_export.checkpoint.weights import index_checkpoint
from gap_export.families.common.checkpoints.configs import check_architecture, recipe_architecture
from gap_export.families.common.checkpoints.matching import (
    KeyLayout,
    main_dtype,
    match_tensors,
    peek_config,
)
from gap_export.families.common.checkpoints.parts import end_of_answer
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.spec.recipe import Recipe

MODEL_TYPE = "gap-export"
_AS_THEY_ARE = KeyLayout(prefixes=())
# config.json speaks of no sizes.
_SIZES_OF = "the recipe"


@dataclass(frozen=True, kw_only=True)
class WholeLayout:
    """``model.safetensors``, and ``{"model_type": "gap-export", "family": ...}`` as config.json.

    Tensors are ``tower.*``, ``projector.*``, ``decoder.*`` and ``lm_head.weight``; the recipe says
    their sizes.

    Attributes:
        family: Name of the family.
    """

    family: str
    name: str = "whole"

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """By config.json's model_type and family."""
        plain = peek_config(checkpoint.main)
        return plain.get("model_type") == MODEL_TYPE and plain.get("family") == self.family

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        folder = checkpoint.main
        file = folder / "config.json"
        architecture = recipe_architecture(recipe)
        check_architecture(recipe, architecture, folder)
        found = index_checkpoint(folder)
        weights = match_tensors(
            found, expected(architecture), _AS_THEY_ARE, where=folder, sizes_of=_SIZES_OF
        )
        files = (file, *sorted({ref.file for ref in found.values()}))
        return ModelSource(
            layout=self.name,
            architecture=architecture,
            weights=weights,
            dtype=main_dtype(weights),
            eos_token_ids=end_of_answer(recipe),
            image_token_id=None,
            tokenizer=read_tokenizer(folder, recipe),
            files=tuple((MAIN, path) for path in files),
        )
