"""MiniGPT-v2: EVA tower whose patches are joined by four, one linear layer, Llama-2 decoder.

EVA was not trained together with a text tower, and no layer of it is left out.
"""

from __future__ import annotations

from gap_export.families.common.readings import WITH_CLS
from gap_export.spec.family import Family

MINIGPT_V2 = Family(
    name="minigpt_v2",
    builder="gap_export.families.minigpt_v2.builder:MINIGPT_V2",
    readings=WITH_CLS,
    protocol="minigpt-v2",
)
