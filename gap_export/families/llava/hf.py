"""LLaVA checkpoints as transformers saves them: one folder that holds everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import LlavaConfig, LlavaNextConfig

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.families.common.checkpoints.configs import (
    check_architecture,
    clip_vision_shape,
    compare_facts,
    decoder_shape,
)
from gap_export.families.common.checkpoints.lora import with_adapter
from gap_export.families.common.checkpoints.matching import (
    KeyLayout,
    match_tensors,
    parse_config,
    peek_config,
)
from gap_export.families.common.checkpoints.one_folder import source_of_folder
from gap_export.families.common.checkpoints.parts import index_folder
from gap_export.families.common.modules.expected import NEWLINE_KEY
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.spec.architecture import Architecture, ProjectorShape
from gap_export.spec.recipe import Recipe

# transformers has written three layouts: 4.x, 4.52 and later in memory, and 5.x.
_KEYS = KeyLayout(
    prefixes=(
        ("language_model.model.", "decoder."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "decoder."),
        ("vision_tower.vision_model.", "tower."),
        ("model.vision_tower.vision_model.", "tower."),
        ("model.vision_tower.", "tower."),
        ("vision_tower.", "tower."),
        ("model.multi_modal_projector.", "projector."),
        ("multi_modal_projector.", "projector."),
        ("model.image_newline", NEWLINE_KEY),
    ),
    ignored_suffixes=(".rotary_emb.inv_freq", ".embeddings.position_ids"),
)


@dataclass(frozen=True, kw_only=True)
class LlavaHfLayout:
    """``LlavaForConditionalGeneration``, or ``LlavaNext...`` with ``newline``.

    Attributes:
        config_class: transformers' config of the family.
        newline: Whether the family has tiles, and the vector that ends their rows.
    """

    name: str
    config_class: type[LlavaConfig | LlavaNextConfig]
    newline: bool = False

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """By the model_type of config.json."""
        plain = peek_config(checkpoint.main)
        # The original LLaVA calls itself the same, but nests no configs.
        nested = "mm_vision_tower" not in plain
        return nested and plain.get("model_type") == self.config_class.model_type

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        folder = checkpoint.main
        found = index_folder(folder)
        # Its annotations leave the nested configs open.
        file = folder / "config.json"
        config: Any = parse_config(self.config_class, file, num_tensors=len(found))
        compare_facts(recipe, folder, self._facts(recipe, config))
        vision = clip_vision_shape(config.vision_config, file)
        decoder = decoder_shape(config.text_config, file)
        projector = ProjectorShape(
            width=vision.width,
            hidden_size=decoder.hidden_size,
            bias=config.multimodal_projector_bias,
            activation=config.projector_hidden_act,
        )
        architecture = Architecture(vision=vision, projector=projector, decoder=decoder)
        check_architecture(recipe, architecture, folder)
        tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
        keys = _KEYS.tying(head=tied)
        weights = match_tensors(found, expected(architecture), keys, where=folder)
        source = source_of_folder(
            recipe,
            folder,
            config,
            architecture,
            weights,
            layout=self.name,
            image_token_id=config.image_token_index,
            files=(ref.file for ref in found.values()),
        )
        return with_adapter(source, folder, _KEYS)

    def _facts(self, recipe: Recipe, config: Any) -> Iterator[tuple[str, Any, Any]]:
        """What is not a size: what it is, as the config has it, as it must be."""
        strategy = config.vision_feature_select_strategy
        yield "vision_feature_select_strategy", strategy, "default"
        yield "vision_feature_layer", config.vision_feature_layer, recipe.select_layer
        if self.newline:
            # Older transformers had a switch, which every published checkpoint turns on.
            newlines = getattr(config, "use_image_newline_parameter", True)
            yield "use_image_newline_parameter", newlines, True
        if self.newline and recipe.image.tiles is not None:
            wanted = [list(size) for size in recipe.image.tiles.resolutions]
            yield "image_grid_pinpoints", config.image_grid_pinpoints, wanted
