"""What ``torch.onnx.export`` of the same decoder takes, with fewer layers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from export_bench.checkpoint import CONFIG


def export_plain(num_layers: int, scratch: str) -> int:
    """Export transformers' decoder of so many layers the documented way.

    Returns:
        Bytes written.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.cache_utils import DynamicCache

    text = {**CONFIG["text_config"], "num_hidden_layers": num_layers}  # type: ignore[dict-item]
    config = LlamaConfig(**text, attn_implementation="eager")
    torch.set_default_dtype(torch.float16)
    model = LlamaForCausalLM(config).eval()

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            inputs_embeds: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[torch.Tensor],
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            cache = DynamicCache()
            for layer in range(num_layers):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            out = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            present = [
                part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)
            ]
            return out.logits, present

    past = [torch.zeros(2, 32, 7, 128) for _ in range(2 * num_layers)]
    inputs = (
        torch.zeros(2, 5, config.hidden_size),
        torch.ones(2, 12, dtype=torch.int64),
        torch.arange(7, 12)[None].repeat(2, 1),
        past,
    )
    auto = torch.export.Dim.AUTO
    shapes = (
        {0: auto, 1: auto},
        {0: auto, 1: auto},
        {0: auto, 1: auto},
        [{0: auto, 2: auto} for _ in past],
    )
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        torch.onnx.export(
            Plain(),
            inputs,
            str(Path(folder) / "decoder.onnx"),
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=True,
            verbose=False,
        )
        return sum(file.stat().st_size for file in Path(folder).iterdir())
