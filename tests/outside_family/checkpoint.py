"""Where the weights are: a folder as transformers saves a LLaVA with this tower and decoder."""

from __future__ import annotations

from dataclasses import dataclass

from gap_export.checkpoint.find.source import MAIN, Checkpoint
from gap_export.checkpoint.tokenizers.tokenizer_json import read_tokenizer
from gap_export.families.common.builder import ModelBuilder
from gap_export.families.common.checkpoints.configs import check_architecture, recipe_architecture
from gap_export.families.common.checkpoints.matching import (
    KeyLayout,
    main_dtype,
    match_tensors,
    model_type_of,
)
from gap_export.families.common.checkpoints.parts import end_of_answer, index_folder
from gap_export.families.common.modules.expected import clip_norm_behind
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.spec.recipe import Recipe
from tests.outside_family.model import PHI, make_tower

# Names in the files, and ours: tower.*, projector.*, decoder.*, lm_head.*.
_KEYS = KeyLayout(
    prefixes=(
        ("language_model.model.final_layernorm.", "decoder.norm."),
        ("language_model.model.", "decoder."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "tower."),
        ("multi_modal_projector.", "projector."),
    ),
)


@dataclass(frozen=True, kw_only=True)
class PhiSiglipLayout:
    """One folder; sizes are the recipe's, and every tensor is held against them."""

    name: str = "phi-siglip"

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """By the two models that config.json nests."""
        kinds = (model_type_of(checkpoint.main, part) for part in ("text_config", "vision_config"))
        return tuple(kinds) == ("phi", "siglip_vision_model")

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """Read the headers of the weights; none is loaded."""
        folder, architecture = checkpoint.main, recipe_architecture(recipe)
        check_architecture(recipe, architecture, folder)
        found = index_folder(folder)
        weights = match_tensors(
            found, expected(architecture), _KEYS, where=folder, sizes_of="the recipe"
        )
        files = [folder / "config.json", *sorted({weight.file for weight in found.values()})]
        return ModelSource(
            layout=self.name,
            architecture=architecture,
            weights=weights,
            dtype=main_dtype(weights),
            eos_token_ids=end_of_answer(recipe),
            image_token_id=recipe.special_tokens[recipe.prompt.image_token],
            tokenizer=read_tokenizer(folder, recipe),
            files=tuple((MAIN, file) for file in files),
        )


BUILDER = ModelBuilder(
    layouts=(PhiSiglipLayout(),),
    tower=make_tower,
    # As in CLIP's checkpoints: the norm behind a layer that never runs.
    never_run=lambda architecture: clip_norm_behind(architecture.vision),
    decoder=PHI,
)
