"""LLaVA-1.5 and LLaVA-1.6: CLIP tower with CLS, two-layer MLP projector, Llama or Mistral decoder.

LLaVA-1.6 cuts images into tiles, with a newline vector after each row. A tile is encoded and pruned
like an image of its own, with its own CLS and its own K.
"""

from __future__ import annotations

from gap_export.families.common.readings import CLIP
from gap_export.spec.family import Family

LLAVA = Family(name="llava", builder="gap_export.families.llava.builder:LLAVA", readings=CLIP)
LLAVA_NEXT = Family(
    name="llava_next", builder="gap_export.families.llava.builder:LLAVA_NEXT", readings=CLIP
)
