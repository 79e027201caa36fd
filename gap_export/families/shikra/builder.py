"""How Shikra's checkpoints are read, and what its modules are."""

from __future__ import annotations

from gap_export.families.common.checkpoints.whole import WholeLayout
from gap_export.families.common.clip_models import clip_builder
from gap_export.families.shikra.delta import ShikraDeltaLayout, ShikraMergedLayout

SHIKRA = clip_builder(ShikraDeltaLayout(), ShikraMergedLayout(), WholeLayout(family="shikra"))
