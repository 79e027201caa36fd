"""A LLaVA that a CPU runs in seconds: CLIP-L/14-336 and a decoder of TinyLlama-1.1B's sizes.

Random fp16 weights, and everything a rival wants beside them: its 692 prompt tokens are 576 visual
ones and about 116 of text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from export_bench.checkpoint import DecoderSizes, config_of, tensors_of, write_shard

LLAVA_1B = DecoderSizes(width=2048, inner=5632, layers=22, heads=32, kv_heads=4)
NAME = "llava-1.1b-shape"
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: <image>\nPlease provide "
    "the bounding box coordinate of the region this sentence describes: {expression} ASSISTANT:"
)
MAX_NEW_TOKENS = 32
_SPECIAL = ("<unk>", "<s>", "</s>")
_IMAGE, _IMAGE_ID, _PAD, _PAD_ID = "<image>", 32000, "<pad>", 32001
# So few merges that the template and an expression of RefShapes take about 116 tokens.
_NUM_MERGED = 416
_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "crop_size": {"height": 336, "width": 336},
    "size": {"shortest_edge": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def write_small(folder: Path) -> bool:
    """Write it, 2.8 GB, under a temporary name until it is whole.

    Returns:
        Whether anything had to be written.
    """
    if folder.is_dir():
        return False
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / "model.safetensors").open("wb") as stream:
        write_shard(stream, list(tensors_of(LLAVA_1B).items()), None)
    vocab_size = config_of(LLAVA_1B)["text_config"]["vocab_size"]
    (partial / "tokenizer.json").write_bytes(_tokenizer(vocab_size))
    for name, content in _json_files().items():
        (partial / name).write_text(json.dumps(content, indent=2))
    (partial / "recipe.yaml").write_text(yaml.safe_dump(_recipe(), sort_keys=False))
    partial.rename(folder)
    return True


def _json_files() -> dict[str, dict[str, Any]]:
    return {
        "config.json": config_of(LLAVA_1B),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": _PAD_ID},
        "preprocessor_config.json": _PREPROCESSOR,
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": _IMAGE,
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": _PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
    }


def _recipe() -> dict[str, Any]:
    return {
        "base": "llava-1.5-7b",
        "name": NAME,
        "family": "llava",
        "summary": "CLIP-L/14-336 and a decoder of TinyLlama's sizes, random weights, for speed",
        "license": "Apache-2.0",
        "checkpoint": {
            "kind": "local",
            "parts": {
                "main": {"what": "random weights"},
                "tower": {"what": "CLIP, for the pruner text", "required": False},
            },
        },
        "architecture": {
            "projector": {"hidden_size": LLAVA_1B.width},
            "decoder": {
                "hidden_size": LLAVA_1B.width,
                "intermediate_size": LLAVA_1B.inner,
                "num_layers": LLAVA_1B.layers,
                "num_heads": LLAVA_1B.heads,
                "num_key_value_heads": LLAVA_1B.kv_heads,
                "head_dim": LLAVA_1B.width // LLAVA_1B.heads,
            },
        },
        "prompt": {
            "template": TEMPLATE,
            "tokenization": "whole",
            "max_new_tokens": MAX_NEW_TOKENS,
        },
    }


def _tokenizer(vocab_size: int) -> bytes:
    """A byte-level BPE of RefShapes' words; every id has a text, most of them a made-up one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    from gap_export.evaluation.refshapes import iter_samples

    samples = iter_samples(seed=0, num_samples=400, split="train")
    texts = [*(sample.expression.text for sample in samples), *[TEMPLATE] * 20]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = level
    trainer = BpeTrainer(
        vocab_size=_NUM_MERGED,
        special_tokens=[*_SPECIAL, _IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    learnt = {text: i for text, i in tokenizer.get_vocab().items() if text != _IMAGE}
    vocabulary = {**learnt, _IMAGE: _IMAGE_ID, _PAD: _PAD_ID}
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused{i}>": i for i in range(vocab_size) if i not in taken}

    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    whole.pre_tokenizer = level
    whole.decoder = decoders.ByteLevel()
    special = [*_SPECIAL, _IMAGE, _PAD]
    whole.add_special_tokens([AddedToken(text, special=True) for text in special])
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return str(whole.to_str()).encode()
