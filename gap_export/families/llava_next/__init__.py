"""LLaVA-1.6: LLaVA-1.5's modules; pictures cut into tiles, a newline vector after each row.

A tile is encoded and pruned like a picture of its own, with its own CLS and its own K; how tiles
become one visual sequence is no part of any module: :func:`spec.tiles.arrange_tiles` does it.
"""

from __future__ import annotations

from transformers import LlavaNextConfig

from gap_export.families.common.clip_llama import ClipLlamaFamily
from gap_export.families.llava.hf import LlavaHfLayout
from gap_export.families.llava.lora import LlavaLoraLayout
from gap_export.families.llava.original import LlavaOriginalLayout

LLAVA_NEXT = ClipLlamaFamily(
    name="llava_next",
    newline=True,
    layouts=(
        LlavaHfLayout(name="llava-next-hf", config_class=LlavaNextConfig, newline=True),
        LlavaOriginalLayout(name="llava-next-original", newline=True),
        LlavaLoraLayout(name="llava-next-lora", newline=True),
    ),
)
