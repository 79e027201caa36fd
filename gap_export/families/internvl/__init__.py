"""InternVL3 and InternVL3.5: InternViT-300M, tokens of 2x2 patches, a Qwen2 or Qwen3 decoder.

The tower was not trained together with a text tower, and no layer of it is left out. In training
of the whole model its CLS token was dropped behind the last layer, so that what CLS attends to
there was never trained.
"""

from __future__ import annotations

from gap_export.families.common.readings import WITH_CLS
from gap_export.spec.family import Family

INTERNVL = Family(
    name="internvl",
    builder="gap_export.families.internvl.builder:INTERNVL",
    readings=WITH_CLS,
    protocol="internvl",
)
