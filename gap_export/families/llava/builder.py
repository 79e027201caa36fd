"""How LLaVA's checkpoints are read, and what its modules are."""

from __future__ import annotations

from dataclasses import replace

from transformers import LlavaConfig, LlavaNextConfig

from gap_export.families.common.clip_models import clip_builder
from gap_export.families.llava.hf import LlavaHfLayout
from gap_export.families.llava.lora import LlavaLoraLayout
from gap_export.families.llava.original import LlavaOriginalLayout

LLAVA = clip_builder(
    LlavaHfLayout(name="llava-hf", config_class=LlavaConfig),
    LlavaOriginalLayout(name="llava-original"),
    LlavaLoraLayout(name="llava-lora"),
)
LLAVA_NEXT = replace(
    clip_builder(
        LlavaHfLayout(name="llava-next-hf", config_class=LlavaNextConfig, newline=True),
        LlavaOriginalLayout(name="llava-next-original", newline=True),
        LlavaLoraLayout(name="llava-next-lora", newline=True),
    ),
    newline=True,
)
