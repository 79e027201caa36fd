"""How checkpoints of Qwen's models are read, and what their modules are."""

from __future__ import annotations

from gap_export.families.common.builder import ModelBuilder
from gap_export.families.common.checkpoints.whole import WholeLayout
from gap_export.families.qwen_vl.checkpoints import QwenLayout
from gap_export.families.qwen_vl.configs import QWEN2, QWEN2_5, QWEN3, ConfigKind
from gap_export.families.qwen_vl.vision import QwenVisionTower, TowerKind, tower_constants
from gap_export.spec.architecture import Architecture


def _builder(configs: ConfigKind, kind: TowerKind) -> ModelBuilder:
    def tower(architecture: Architecture, num_layers: int) -> QwenVisionTower:
        return QwenVisionTower(architecture, kind=kind, num_layers=num_layers)

    family = configs.config_class.model_type
    return ModelBuilder(
        layouts=(QwenLayout(configs), WholeLayout(family=family)),
        tower=tower,
        tower_constants=tower_constants,
    )


QWEN2_VL = _builder(QWEN2, TowerKind())
QWEN2_5_VL = _builder(QWEN2_5, TowerKind(gated=True))
QWEN3_VL = _builder(QWEN3, TowerKind(patch_bias=True))
