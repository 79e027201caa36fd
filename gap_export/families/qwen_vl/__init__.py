"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a tower with 2-D RoPE, a merger of 2x2 patches, M-RoPE.

The towers take any size of image; a bundle is made for one canvas. They have no CLS token. Qwen3-VL
hands features of three earlier layers on to the first layers of its decoder (DeepStack).
"""

from __future__ import annotations

from gap_export.families.common.readings import ANY_TOWER
from gap_export.spec.family import Family

_BUILDERS = "gap_export.families.qwen_vl.builder"
_READINGS = ANY_TOWER | {"received_attention"}

QWEN2_VL = Family(name="qwen2_vl", builder=f"{_BUILDERS}:QWEN2_VL", readings=_READINGS)
QWEN2_5_VL = Family(name="qwen2_5_vl", builder=f"{_BUILDERS}:QWEN2_5_VL", readings=_READINGS)
QWEN3_VL = Family(name="qwen3_vl", builder=f"{_BUILDERS}:QWEN3_VL", readings=_READINGS)
