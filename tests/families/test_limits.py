"""Values of a config.json that no model can have: each is named, never a traceback."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlavaConfig

from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.matching import build_config
from tests.families import reading


def refusal(
    checkpoint: Path, folder: Path, recipe: Any, section: str, key: str, value: object
) -> str:
    shutil.copytree(checkpoint, folder)
    file = folder / section.split(":", maxsplit=1)[0]
    plain = json.loads(file.read_text())
    target = plain
    for part in section.split(":")[1:]:
        target = target[part]
    target[key] = value
    file.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError) as caught:
        reading.build(recipe, folder, "text", 0.3, device="meta")
    message = str(caught.value)
    assert len(message) < 1000
    return message


VISION = "config.json:vision_config"
DECODER = "config.json:text_config"
ROPE = "config.json:text_config:rope_parameters"
TOWER = "clip/config.json"


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        *((VISION, "patch_size", v, "a whole number, 1..") for v in (0, None, -8, 2.5, True)),
        *((VISION, "image_size", v, "a whole number, 1..") for v in ("32", [32, 32], 10**9)),
        *((s, "num_attention_heads", 0, "1..") for s in (VISION, DECODER, TOWER)),
        *((s, "num_attention_heads", 5, "hidden_size, 32") for s in (VISION, TOWER)),
        *((s, "hidden_size", 10**12, "1..") for s in (VISION, DECODER, TOWER)),
        *((s, "hidden_act", "geru", "gelu, ") for s in (VISION, DECODER, TOWER)),
        *((s, "hidden_act", "prelu", "gelu, ") for s in (VISION, DECODER, TOWER)),
        ("config.json", "projector_hidden_act", "geru", "gelu, "),
        *((s, "vocab_size", v, "1..") for s in (DECODER, TOWER) for v in (0, -1, 10**12)),
        *((s, "num_hidden_layers", v, "tensors") for s in (VISION, DECODER) for v in (0, -1)),
        *((ROPE, "rope_theta", v, "above 0") for v in (0, -1.0, "x", float("nan"), True, None)),
        *((DECODER, "rms_norm_eps", v, "above 0") for v in (0.0, 10**400)),
        (DECODER, "num_key_value_heads", 0, "1.."),
        (DECODER, "num_key_value_heads", 3, "num_attention_heads, 4"),
        (DECODER, "head_dim", 7, "even"),
        (DECODER, "max_position_embeddings", 0, "1.."),
        (TOWER, "projection_dim", None, "1.."),
        (TOWER, "max_position_embeddings", 200_000, "at most"),
        *((TOWER, "eos_token_id", v, "one id, 0..") for v in (None, [2], -1, 10**6)),
    ],
)
def test_impossible_value_is_named(
    tiny_checkpoint, tiny_recipe, tmp_path, section, key, value, allowed
):
    message = refusal(tiny_checkpoint, tmp_path / "c", tiny_recipe, section, key, value)
    assert key in message and "allowed: " in message
    assert allowed in message.split("allowed: ")[1]


@pytest.mark.parametrize("section", [VISION, DECODER, TOWER])
def test_layers_beyond_the_checkpoints_tensors_are_refused_at_once(
    tiny_checkpoint, tiny_recipe, tmp_path, section
):
    start = time.perf_counter()
    message = refusal(
        tiny_checkpoint, tmp_path / "c", tiny_recipe, section, "num_hidden_layers", 10**7
    )
    assert time.perf_counter() - start < 2
    assert "num_hidden_layers" in message and "10000000" in message


def nested(depth: int, inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = {"a": inner}
    return inner


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (nested(600), "nested deeper than 20"),
        ([[nested(20)]], "nested deeper than 20"),
        ({f"k{n}": n for n in range(10_000)}, "more than 10000 values"),
        ([0] * 10_000, "more than 10000 values"),
    ],
)
def test_config_that_would_keep_a_parser_busy_is_refused(value, says):
    with pytest.raises(CheckpointError, match=f"c/config.json: .*{says}"):
        build_config(LlamaConfig, {"odd": value}, Path("c/config.json"), num_tensors=10)


def test_classes_of_a_classifier_are_passed_over():
    start = time.perf_counter()
    labels = {"num_labels": 10**12, "id2label": {"0": [1]}, "label2id": 7}
    plain = {**labels, "hidden_size": 32, "text_config": {"hidden_size": 64, **labels}}
    for cls in (LlamaConfig, LlavaConfig):
        config = build_config(cls, plain, Path("config.json"), num_tensors=10)
        assert config.num_labels == 2
    assert config.text_config.hidden_size == 64
    assert time.perf_counter() - start < 2
