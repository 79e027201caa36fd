"""From the names of InternVL's tensors to ours, which are CLIP's for the tower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gap_export.families.common.checkpoints.matching import KeyLayout

_LAYER = re.compile(
    r"(?P<stack>tower\.encoder\.layers\.\d+\.)(?P<name>.+?)(?P<leaf>\.weight|\.bias|)"
)


@dataclass(frozen=True, kw_only=True)
class InternVlKeys(KeyLayout):
    """Prefixes, then what is called otherwise within a layer of the tower.

    Attributes:
        layer_names: Our name of a module or parameter of a layer by theirs.
    """

    layer_names: Mapping[str, str]

    def canonical(self, key: str) -> str:
        """Our name of a tensor in a file."""
        # Modules in memory bear a prefix that files have not; some were saved with it.
        ours = super().canonical(key.removeprefix("model."))
        layer = _LAYER.fullmatch(ours)
        if layer is None:
            return ours
        name = self.layer_names.get(layer["name"], layer["name"])
        return f"{layer['stack']}{name}{layer['leaf']}"


HF_KEYS = InternVlKeys(
    prefixes=(
        ("vision_tower.embeddings.cls_token", "tower.embeddings.class_embedding"),
        (
            "vision_tower.embeddings.position_embeddings",
            "tower.embeddings.position_embedding.weight",
        ),
        (
            "vision_tower.embeddings.patch_embeddings.projection.",
            "tower.embeddings.patch_embedding.",
        ),
        ("vision_tower.encoder.layer.", "tower.encoder.layers."),
        ("multi_modal_projector.layer_norm.", "projector.norm."),
        ("multi_modal_projector.", "projector."),
        ("language_model.model.", "decoder."),
        ("language_model.lm_head.", "lm_head."),
        ("language_model.", "decoder."),
    ),
    ignored_suffixes=(".rotary_emb.inv_freq",),
    layer_names={
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.projection_layer": "self_attn.out_proj",
        "layernorm_before": "layer_norm1",
        "layernorm_after": "layer_norm2",
        "lambda_1": "layer_scale1",
        "lambda_2": "layer_scale2",
    },
)
ORIGINAL_KEYS = InternVlKeys(
    prefixes=(
        (
            "vision_model.embeddings.position_embedding",
            "tower.embeddings.position_embedding.weight",
        ),
        ("vision_model.", "tower."),
        ("mlp1.0.", "projector.norm."),
        ("mlp1.1.", "projector.linear_1."),
        ("mlp1.3.", "projector.linear_2."),
        ("language_model.model.", "decoder."),
        ("language_model.lm_head.", "lm_head."),
    ),
    ignored_suffixes=(".rotary_emb.inv_freq",),
    layer_names={
        # The three are one tensor there, and are told apart before.
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "ls1": "layer_scale1",
        "ls2": "layer_scale2",
    },
)
