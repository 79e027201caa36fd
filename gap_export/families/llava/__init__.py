"""LLaVA-1.5: CLIP tower with CLS, two-layer MLP projector, Llama decoder with RoPE."""

from __future__ import annotations

from transformers import LlavaConfig

from gap_export.families.common.clip_llama import ClipLlamaFamily
from gap_export.families.llava.hf import LlavaHfLayout
from gap_export.families.llava.lora import LlavaLoraLayout
from gap_export.families.llava.original import LlavaOriginalLayout

LLAVA = ClipLlamaFamily(
    name="llava",
    layouts=(
        LlavaHfLayout(name="llava-hf", config_class=LlavaConfig),
        LlavaOriginalLayout(name="llava-original"),
        LlavaLoraLayout(name="llava-lora"),
    ),
)
