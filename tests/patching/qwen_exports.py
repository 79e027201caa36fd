"""Exports of tiny Qwen2-VL models, with the inputs and outputs that the ONNX community gives them.

All patches and the grid go into the encoder, ids of three axes into the decoder. Modules are
transformers' own, in torch's first exporter, which fixes the grid it was traced with.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.families.qwen_vl.tiny import MERGE, PATCH, make_tiny
from tests.patching.exports import Decoder, Embed

ASSETS = ("config.json", "generation_config.json", "tokenizer.json", "recipe.yaml")


class Vision(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.visual

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        features = self.tower(pixel_values, grid_thw=image_grid_thw).pooler_output
        # The exporter has made constants of the grid, and would drop an input that nothing reads.
        return features + 0 * image_grid_thw.sum()


def build_qwen_export(family: str, folder: Path, canvas: tuple[int, int]) -> Path:
    """Export the three graphs of a tiny checkpoint on a canvas, with its configs beside them."""
    tiny = make_tiny(family, folder / "checkpoint", canvas=canvas)
    out = folder / "export"
    (out / "onnx").mkdir(parents=True)
    model, text = tiny.model, tiny.model.config.text_config
    rows, cols = (side // PATCH for side in canvas)
    grid = torch.tensor([[1, rows, cols]])
    past = [
        f"past_key_values.{i}.{part}" for i in range(text.num_hidden_layers)
        for part in ("key", "value")
    ]  # fmt: skip
    present = [name.replace("past_key_values", "present") for name in past]
    width = text.hidden_size // text.num_attention_heads
    batch, fed, filled = 2, 3, 5
    tokens = {0: "batch", 1: "sequence"}
    ids = torch.arange(filled, filled + fed).expand(3, batch, fed).contiguous()
    cache = [torch.randn(batch, text.num_key_value_heads, filled, width) for _ in past]
    jobs = {
        "vision_encoder": (
            Vision(model), (torch.randn(rows * cols, 3 * 2 * PATCH**2), grid),
            {"pixel_values": {0: "patches"}, "image_grid_thw": {0: "images"}},
            {"image_features": {0: "tokens"}},
        ),
        "embed_tokens": (
            Embed(model), (torch.ones(batch, fed, dtype=torch.int64),),
            {"input_ids": tokens}, {"inputs_embeds": tokens},
        ),
        "decoder_model_merged": (
            Decoder(model),
            (
                torch.randn(batch, fed, text.hidden_size),
                torch.ones(batch, filled + fed, dtype=torch.int64), ids, *cache,
            ),
            {
                "inputs_embeds": tokens, "attention_mask": {0: "batch", 1: "total"},
                "position_ids": {1: "batch", 2: "sequence"},
                **{name: {0: "batch", 2: "past"} for name in past},
            },
            {"logits": tokens, **{name: {0: "batch", 2: "total"} for name in present}},
        ),
    }  # fmt: skip
    for component, (module, args, inputs, outputs) in jobs.items():
        with warnings.catch_warnings(), torch.no_grad():
            # The exporter warns of itself.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(), args, out / f"onnx/{component}.onnx", dynamo=False,
                opset_version=18, input_names=list(inputs), output_names=list(outputs),
                dynamic_axes={**inputs, **outputs},
            )  # fmt: skip
    for name in ASSETS:
        shutil.copyfile(tiny.folder / name, out / name)
    assert (rows * cols) % MERGE**2 == 0
    return out
