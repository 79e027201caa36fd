"""What a folder or a file is that holds no checkpoint we read, by its names and its config.

A refusal that names the cause saves a user the search for it: quantized weights, a lone adapter,
the formats of other programs, a folder with a part of a model only.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gap_export.checkpoint.find.hub_cache import ADAPTER_CONFIG, find_repository, read_object
from gap_export.checkpoint.find.unprunable import refuse_unprunable
from gap_export.errors import CheckpointError
from gap_export.spec.recipe import HubRepository

# Beside adapters LLaVA's authors put the rest of what was trained: a layout of its own.
_TRAINED_BESIDE = "non_lora_trainables.bin"
_WHOLE = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# Shards without their index, and variants that from_pretrained has to be asked for.
_WEIGHTS = re.compile(r"(pytorch_)?model[.-].+\.(safetensors|bin)", re.DOTALL)
_MAX_NAMES = 10_000
# AutoGPTQ's and AutoAWQ's first versions, and NVIDIA's ModelOpt, wrote these beside config.json.
_QUANTIZER_FILES = {
    "quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "ModelOpt",
}  # fmt: skip
# Endings of tensors that quantizers write in place of, or beside, a matrix.
_QUANTIZED_TENSORS: Mapping[str, str] = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".g_idx": "GPTQ",
    ".absmax": "bitsandbytes", ".quant_map": "bitsandbytes", ".SCB": "bitsandbytes",
    ".nested_absmax": "bitsandbytes", ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8", ".weight_packed": "compressed-tensors", ".scales": "MLX or AWQ",
    ".weight_qdata": "torchao", ".input_scale": "FP8", ".W_q": "HQQ", ".weight._data": "quanto",
    ".weight_zero_point": "compressed-tensors",
}  # fmt: skip
_PROCESSOR_FILES = frozenset({
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "preprocessor_config.json",
    "processor_config.json", "special_tokens_map.json",
})  # fmt: skip


def refuse_foreign(place: Path) -> None:
    """Refuse what holds no checkpoint that can be read, where it is known what it is instead.

    Args:
        place: A folder, or a file; what is not there, or cannot be listed, is not refused here.

    Raises:
        CheckpointError: a model that cannot be pruned, quantized weights, a lone adapter, a format
            of another program, or a folder without weights.
    """
    names = _names(place)
    config = read_object(place / "config.json") if "config.json" in names else {}
    refuse_unprunable(place, config)
    _refuse_quantized(place, names, config)
    if "model_index.json" in names:
        raise _wrong("this is a pipeline of diffusers, which draws images", place, "model_index")
    if any(name in names for name in _WHOLE):
        return
    if ADAPTER_CONFIG in names and _TRAINED_BESIDE not in names:
        raise _lone_adapter(place)
    for ends, what, fix in _FORMATS:
        found = sorted(name for name in names if name.lower().endswith(ends))
        if found:
            raise _wrong(what, place, ", ".join(found[:3]), fix)
    weights = sorted(name for name in names if _WEIGHTS.fullmatch(name))
    if weights and "config.json" in names and ADAPTER_CONFIG not in names:
        raise _wrong(
            "the folder has weights, and none by the names that are read",
            place,
            ", ".join(weights[:3]),
            f"name them {_WHOLE[0]} or {_WHOLE[2]}, or get the index of the files, "
            f"{_WHOLE[1]} or {_WHOLE[3]}",
        )
    if names and names <= _PROCESSOR_FILES:
        raise _wrong(
            "this folder has a tokenizer or a processor and no model",
            place,
            ", ".join(sorted(names)),
            "name the folder of the whole checkpoint, or download the rest of its files",
        )


def describe_config(folder: Path) -> str | None:
    """The model that a folder's config.json says it is, in words; None where it says nothing."""
    config = read_object(folder / "config.json")
    kind, classes = config.get("model_type"), config.get("architectures")
    words = [f"model_type {reprlib.repr(kind)}"] if config else []
    if isinstance(classes, list) and classes:
        words.append(f"architecture {reprlib.repr(classes[0])}")
    if words and config.get("auto_map"):
        words.append("with code of its own, which is not run")
    return ", ".join(words) or None


def quantizer_of(names: list[str]) -> str | None:
    """What quantized a checkpoint, judged by the names of tensors that do not belong in it."""
    found = {
        _QUANTIZED_TENSORS[end] for n in names for end in _QUANTIZED_TENSORS if n.endswith(end)
    }
    return " or ".join(sorted(found)) or None


def quantized(what: str, seen: object, *, original: str | None = None) -> CheckpointError:
    """The error for a checkpoint of quantized weights.

    Args:
        what: What quantized it.
        seen: What shows it.
        original: The checkpoint it was made from, if that is known.
    """
    return CheckpointError(
        f"the checkpoint is quantized ({what}), which is not read",
        seen=seen,
        allowed="weights in float32, float16 or bfloat16",
        fix=f"export the checkpoint that it was quantized from{f', {original}' if original else ''}"
        "; for a bundle with 4-bit weights add --dtype int4",
    )


def _refuse_quantized(place: Path, names: set[str], config: Mapping[str, Any]) -> None:
    name = config.get("_name_or_path")
    original = reprlib.repr(name) if isinstance(name, str) and name else None
    parts = (config.get(f"{part}_config") for part in ("text", "llm", "vision"))
    for owner in (config, *parts):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = owner.get(key) if isinstance(owner, dict) else None
            if isinstance(found, dict) and found:
                shown = f"{place / 'config.json'}: {key}"
                raise quantized(_method(key, found), shown, original=original)
    for file, method in _QUANTIZER_FILES.items():
        if file in names:
            raise quantized(method, place / file, original=original)


def _method(key: str, found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if key == "quantization":
        method = "MLX"
    elif method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    bits = found.get("bits") or (4 if found.get("load_in_4bit") else None)
    bits = bits or (8 if found.get("load_in_8bit") else None)
    name = reprlib.repr(method).strip("'") if method is not None else "by an unnamed method"
    return f"{name}, {bits} bits" if type(bits) is int else name


def _lone_adapter(place: Path) -> CheckpointError:
    config = read_object(place / ADAPTER_CONFIG)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    name, seen = "its base model", str(place)
    if isinstance(base, str) and base:
        try:
            here = Path(base) if Path(base).is_dir() else find_repository(HubRepository(id=base))
        except (OSError, ValueError):  # no name of a folder, or of a repository
            here = None
        name = reprlib.repr(base)
        seen += f", trained on {name}" + ("" if here is None else f" (here: {here})")
    return CheckpointError(
        f"this is an adapter of peft ({reprlib.repr(kind)}) without the model it belongs to",
        seen=seen,
        allowed="a whole model, with or without an adapter beside it",
        fix=f"copy the files of {name} into one folder with the adapter's and export that, or "
        "merge it with peft's merge_and_unload and export what that saves; an adapter of LLaVA's "
        f"authors needs its {_TRAINED_BESIDE} beside it",
    )


def _wrong(what: str, place: Path, seen: str, fix: str | None = None) -> CheckpointError:
    return CheckpointError(
        what,
        seen=f"{place}: {seen}",
        allowed="a folder with config.json and weights as safetensors or PyTorch pickles",
        fix=fix,
    )


# (how names end, what they then are, what to do), for folders without weights that can be read.
_FORMATS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (".gguf", ".ggml"),
        "this is a model for llama.cpp (GGUF)",
        "export the checkpoint that it was converted from, as transformers or its authors save it",
    ),
    (
        (".onnx",),
        "this is an ONNX export and no checkpoint",
        "put pruner and GapRemap into it with: gap-export patch DIR",
    ),
    (
        ("tf_model.h5", ".ckpt.index", "flax_model.msgpack", "flax_model.msgpack.index.json"),
        "these are weights for TensorFlow or Flax",
        "download the PyTorch weights of the model, or convert them with transformers 4",
    ),
    (
        ("weights.npz",),
        "these are weights for MLX",
        "load the model with the program it is for, and save it with transformers",
    ),
    (
        ("consolidated.00.pth", "consolidated.safetensors", "params.json"),
        "these are weights as Meta or Mistral publish them for their own code",
        "download the model as converted for transformers",
    ),
)


def _names(place: Path) -> set[str]:
    """Names of the files in a folder and in its ``onnx/``, or of the file itself."""
    try:
        if not place.is_dir():
            return {place.name} if place.is_file() else set()
        names = {path.name for path, _ in zip(place.iterdir(), range(_MAX_NAMES), strict=False)}
        if (place / "onnx").is_dir():
            names |= {path.name for path in (place / "onnx").glob("*.onnx")}
    except (OSError, ValueError):
        return set()
    return names
