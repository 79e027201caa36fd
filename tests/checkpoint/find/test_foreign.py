"""What is no checkpoint that can be read is refused by what it is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gap_export.checkpoint.find.foreign import refuse_foreign
from gap_export.checkpoint.find.source import Checkpoint, resolve_model
from gap_export.errors import CheckpointError
from gap_export.families import read_source
from gap_export.spec.recipe import load_recipe

Files = dict[str, Any]
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}


def config(**quantization: Any) -> Files:
    plain = {"model_type": "llava", "_name_or_path": "me/original"}
    return {"config.json": {**plain, **quantization}, "model.safetensors": b""}


def put(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
    return folder


CASES: list[tuple[Files, list[str]]] = [
    (config(quantization_config=BNB), ["quantized (bitsandbytes, 4 bits)", "--dtype int4"]),
    (config(quantization_config={"load_in_8bit": True}), ["quantized (bitsandbytes, 8 bits)"]),
    (config(quantization_config={"quant_method": "awq", "bits": 4}), ["(awq, 4", "'me/original'"]),
    (config(quantization_config={"quant_method": "gptq", "bits": 3}), ["quantized (gptq, 3 bits)"]),
    (config(quantization_config={"quant_method": "fp8"}), ["quantized (fp8)"]),
    (config(quantization_config={"quant_method": "compressed-tensors"}), ["(compressed-tensors)"]),
    (config(quantization_config={"quant_method": "torchao"}), ["quantized (torchao)"]),
    (config(compression_config={"format": "x"}), ["quantized"]),
    (config(quantization={"group_size": 64, "bits": 4}), ["quantized (MLX, 4 bits)"]),
    (config(text_config={"quantization_config": BNB}), ["quantized (bitsandbytes, 4 bits)"]),
    (config(vision_config={"quantization_config": BNB}), ["quantized (bitsandbytes, 4 bits)"]),
    ({**config(), "quantize_config.json": {"bits": 4}}, ["quantized (gptq)"]),
    ({**config(), "hf_quant_config.json": {"quantization": {}}}, ["quantized (ModelOpt)"]),
    ({"llava-Q4_K.gguf": b""}, ["llama.cpp (GGUF)", "converted from"]),
    ({"config.json": {}, "ggml-model.gguf": b"", "README.md": b""}, ["llama.cpp (GGUF)"]),
    ({"config.json": {}, "onnx/decoder_model_merged.onnx": b""}, ["ONNX export", "patch DIR"]),
    ({"config.json": {}, "tf_model.h5": b""}, ["TensorFlow or Flax"]),
    ({"config.json": {}, "flax_model.msgpack": b""}, ["TensorFlow or Flax"]),
    ({"config.json": {}, "weights.npz": b""}, ["MLX"]),
    ({"params.json": {}, "consolidated.00.pth": b""}, ["Meta or Mistral"]),
    ({"model_index.json": {}, "model.safetensors": b""}, ["pipeline of diffusers"]),
    ({"tokenizer.json": {}, "preprocessor_config.json": {}}, ["tokenizer or a processor"]),
    ({"config.json": {}, "model.fp16.safetensors": b""}, ["none by the names", "model.fp16"]),
    ({"config.json": {}, "model-00001-of-00002.safetensors": b""}, ["none by the names"]),
    (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": b""},
        ["adapter of peft ('LORA')", "'llava-hf/llava-1.5-7b-hf'", "merge_and_unload"],
    ),
    ({"adapter_config.json": {}}, ["adapter of peft", "its base model"]),
    (config(model_type="qwen3_5"), ["is Qwen3.5", "position ids kept", "linear attention"]),
    (config(model_type="qwen3_5_moe"), ["Qwen3.5, whose", "every slot changes a running state"]),
    (config(text_config={"model_type": "qwen3_next"}), ["Qwen3-Next", "'qwen3_next'"]),
    (config(model_type="lfm2_vl"), ["LFM2, whose", "convolutions over slots"]),
    (config(model_type="gemma4"), ["Gemma 4", "windows that are counted in slots"]),
    (config(text_config={"model_type": "gemma3_text"}), ["Gemma 3", "'gemma3_text'"]),
    (
        config(text_config={"layer_types": ["full_attention", "sliding_attention"]}),
        ["a model of type 'llava'", "layer_types with sliding_attention"],
    ),
]


@pytest.mark.parametrize(("files", "said"), CASES, ids=[said[0] for _, said in CASES])
def test_the_cause_is_named(tmp_path, files, said):
    folder = put(tmp_path / "m", files)
    # With a recipe's name, and without one.
    for recipe in ("llava", None):
        with pytest.raises(CheckpointError) as caught:
            read_source(*resolve_model(str(folder), recipe=recipe))
        assert all(words in str(caught.value) for words in said), caught.value


@pytest.mark.parametrize("name", ["model.gguf", "model.onnx", "tf_model.h5"])
def test_a_file_is_told_as_well(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"GGUF|ONNX|TensorFlow"):
        refuse_foreign(put(tmp_path, {name: b""}) / name)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {"quantization_config": None}, "model.safetensors": b"", "a.gguf": b""},
        {"config.json": {}, "pytorch_model.bin.index.json": {}},
        {"config.json": {}, "adapter_config.json": {}, "non_lora_trainables.bin": b""},
        {"minigptv2_checkpoint.pth": b""},
        {"config.json": b"no json", "model.safetensors": b""},
        {},
    ],
)
def test_what_may_be_a_checkpoint_is_left_to_its_reader(tmp_path, files):
    refuse_foreign(put(tmp_path / "m", files))


def test_the_base_of_an_adapter_is_found_where_it_lies(tmp_path):
    base = put(tmp_path / "base", {"config.json": {}})
    adapter = {"adapter_config.json": {**ADAPTER, "base_model_name_or_path": str(base)}}
    with pytest.raises(CheckpointError, match=re.escape(f"(here: {base})")):
        refuse_foreign(put(tmp_path / "m", adapter))


@pytest.mark.parametrize("recipe", ["llava", None])
@pytest.mark.parametrize("kind", ["idefics3", "mllama"])
def test_an_unsupported_architecture_is_named(tmp_path, recipe, kind):
    plain = {"model_type": kind, "architectures": ["SomeVLModel"], "auto_map": {"AutoModel": "x"}}
    folder = put(tmp_path / "m", {"config.json": plain, "model.safetensors": b""})
    with pytest.raises(CheckpointError) as caught:
        read_source(*resolve_model(str(folder), recipe=recipe))
    words = f"model_type '{kind}', architecture 'SomeVLModel', with code of its own"
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "method"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight.absmax", "bitsandbytes"),
        ("weight_scale_inv", "FP8"),
        ("W_q", "HQQ"),
        ("weight._data", "quanto"),
        ("weight_zero_point", "compressed-tensors"),
    ],
)
def test_tensors_of_a_quantizer_name_it(tmp_path, tiny_checkpoint, ending, method):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("mlp.up_proj.weight"))
    tensors[name.removesuffix("weight") + ending] = tensors[name].clone()
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"quantized \({method}.*--dtype int4"):
        read_source(load_recipe(folder / "recipe.yaml"), Checkpoint.of(folder))


@pytest.mark.parametrize(
    ("dtype", "bin_method"), [(torch.int8, "at most 8 bits"), (torch.float8_e4m3fn, "FP8")], ids=str
)
def test_weights_of_eight_bits_are_quantized_ones_in_either_format(
    tmp_path, tiny_checkpoint, dtype, bin_method
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("mlp.up_proj.weight"))
    tensors[name] = tensors[name].to(dtype)
    (folder / "model.safetensors").unlink()
    for method, save, file in (
        ("at most 8 bits", save_file, folder / "model.safetensors"),
        (bin_method, torch.save, folder / "pytorch_model.bin"),
    ):
        save(tensors, file)
        with pytest.raises(CheckpointError, match=rf"quantized \({method}.*--dtype int4"):
            read_source(load_recipe(folder / "recipe.yaml"), Checkpoint.of(folder))
        file.unlink()
