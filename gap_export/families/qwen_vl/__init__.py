"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a tower with 2-D RoPE, a merger of 2x2 patches, M-RoPE.

The towers take any size of image; a bundle is made for one canvas. They have no CLS token. Qwen3-VL
hands features of three earlier layers on to the first layers of its decoder (DeepStack).
"""

from __future__ import annotations

from gap_export.families.common.readings import ANY_TOWER
from gap_export.spec.family import Family

_BUILDERS = "gap_export.families.qwen_vl.builder"
_READINGS = ANY_TOWER | {"received_attention"}


def _family(name: str, builder: str) -> Family:
    return Family(name=name, builder=f"{_BUILDERS}:{builder}", readings=_READINGS, any_canvas=True)


QWEN2_VL = _family("qwen2_vl", "QWEN2_VL")
QWEN2_5_VL = _family("qwen2_5_vl", "QWEN2_5_VL")
QWEN3_VL = _family("qwen3_vl", "QWEN3_VL")
