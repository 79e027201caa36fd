"""How far each output may be from its reference, by dtype: the one place that says so.

fp32 graphs differ from PyTorch only in the order of sums. The tolerance is relative to each
output's own size, with an absolute floor for values near zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """|reference - candidate| <= atol + rtol * |reference|."""

    atol: float
    rtol: float


EXACT = Tolerance(atol=0.0, rtol=0.0)
_FLOAT32 = Tolerance(atol=1e-4, rtol=1e-4)

TOLERANCES: Mapping[str, Mapping[str, Tolerance]] = {
    "float32": {
        "text_embeds": _FLOAT32,
        "image_features": _FLOAT32,
        "keep_indices": EXACT,
        "inputs_embeds": EXACT,
        "logits": _FLOAT32,
    },
}
