"""Exports of the tiny model made with torch.onnx.export alone, named as the ONNX community does.

Nothing of ours has a part in them: modules are transformers' own, thin wrappers flatten the cache.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache

from tests.shared import SharedFolder

ASSETS = ("config.json", "generation_config.json", "tokenizer.json", "recipe.yaml")
COMPONENTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
_HIDDEN, _SIDE = 32, 32


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to export."""

    opset: int = 17
    dtype: str = "float32"
    dynamo: bool = False
    attention: str = "sdpa"

    def __str__(self) -> str:
        how = "dynamo" if self.dynamo else "torchscript"
        return f"{how}-opset{self.opset}-{self.dtype}-{self.attention}"


def shared_export(shared: SharedFolder, checkpoint: Path, how: Recipe) -> Path:
    """The export of a checkpoint that is the same in all of a run, made by who asks first."""
    return shared.once(f"export-{how}", lambda folder: build_export(checkpoint, folder, how))


class Vision(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.first = int(model.config.vision_feature_select_strategy == "default")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return self.projector(states[-2][:, self.first :])


class Embed(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embedding = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids)


class Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.head = model.model.language_model, model.lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids, *past):
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        answer = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        grown = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return self.head(answer.last_hidden_state), *grown


def build_export(
    checkpoint: Path, folder: Path, how: Recipe | None = None, *, ending: str = ""
) -> Path:
    """Export a checkpoint's three graphs, with its configs and tokenizer beside them."""
    how = how or Recipe()
    folder.mkdir(parents=True, exist_ok=True)
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=getattr(torch, how.dtype), attn_implementation=how.attention
    ).eval()
    text = model.config.text_config
    layers = text.num_hidden_layers
    heads = text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    past = [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in past]
    dtype = getattr(torch, how.dtype)
    batch, fed, filled = 2, 3, 5
    tokens = {0: "batch", 1: "sequence"}
    grown = {name: {0: "batch", 2: "total"} for name in present}
    cache = {name: {0: "batch", 2: "past"} for name in past}
    jobs = [
        (
            Vision(model), (torch.randn(batch, 3, _SIDE, _SIDE, dtype=dtype),),
            {"pixel_values": {0: "images"}}, {"image_features": {0: "images"}},
        ),
        (
            Embed(model), (torch.ones(batch, fed, dtype=torch.int64),),
            {"input_ids": tokens}, {"inputs_embeds": tokens},
        ),
        (
            Decoder(model),
            (
                torch.randn(batch, fed, _HIDDEN, dtype=dtype),
                torch.ones(batch, filled + fed, dtype=torch.int64),
                torch.arange(filled, filled + fed).repeat(batch, 1),
                *(torch.randn(batch, heads, filled, head_dim, dtype=dtype) for _ in past),
            ),
            {
                "inputs_embeds": tokens, "attention_mask": {0: "batch", 1: "total"},
                "position_ids": tokens, **cache,
            },
            {"logits": tokens, **grown},
        ),
    ]  # fmt: skip
    for component, job in zip(COMPONENTS, jobs, strict=True):
        _export(*job, folder / f"{component}{ending}.onnx", how)
    for name in ASSETS:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, folder / name)
    return folder


def _export(module, args, inputs, outputs, path, how):
    options: dict[str, Any] = {"dynamic_axes": {**inputs, **outputs}}
    if how.dynamo:
        auto = [dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in inputs.values()]
        if isinstance(module, Decoder):
            auto = [*auto[:3], tuple(auto[3:])]
        options = {"dynamic_shapes": tuple(auto), "verbose": False}
    with warnings.catch_warnings(), torch.no_grad():
        # The exporters warn of themselves.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), args, path, dynamo=how.dynamo, opset_version=how.opset,
            input_names=list(inputs), output_names=list(outputs), **options,
        )  # fmt: skip
