"""InternVL checkpoints as transformers saves them, e.g. OpenGVLab/InternVL3-1B-hf."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import InternVLConfig

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import read_json_object
from gap_export.families.common.checkpoints.matching import peek_config
from gap_export.families.common.checkpoints.parts import index_folder
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.families.internvl.checkpoint import build_source, read_config
from gap_export.families.internvl.names import HF_KEYS
from gap_export.spec.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class InternVlHfLayout:
    """``InternVLForConditionalGeneration``."""

    name: str = "internvl-hf"

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """By the model_type of config.json."""
        return peek_config(checkpoint.main).get("model_type") == InternVLConfig.model_type

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        folder = checkpoint.main
        found = index_folder(folder)
        file = folder / "config.json"
        config = read_config(read_json_object(file), file, num_tensors=len(found))
        return build_source(
            recipe,
            folder,
            config,
            found,
            HF_KEYS,
            expected,
            layout=self.name,
            files={weight.file for weight in found.values()},
        )
