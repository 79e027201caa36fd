"""LLaVA trained with LoRA, as its authors publish it, e.g. liuhaotian/llava-v1.5-7b-lora.

Three parts: adapters and projector (``main``), the language model they belong to (``base``), and
OpenAI's vision tower (``tower``). The adapters are merged as each matrix is written.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gap_export.architecture import DecoderShape
from gap_export.errors import CheckpointError
from gap_export.families.checkpoints.llava_original import (
    ADAPTER_CONFIG,
    KEYS,
    assemble_original,
    is_original,
    read_original_config,
)
from gap_export.families.checkpoints.parts import Stored, check_base, read_language_model
from gap_export.families.modules.expected import expected_decoder
from gap_export.families.reference import ModelSource
from gap_export.recipe import Recipe
from gap_export.source import MAIN, Checkpoint
from gap_export.weights import (
    FLOAT_DTYPES,
    Weight,
    index_files,
    index_pickle,
    merge_lora,
    read_json_object,
)

BASE = "base"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED_FILE = "non_lora_trainables.bin"
# Newer versions of peft name the adapter, which is the default one.
_ADAPTER_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)
# Of adapter_config.json: what is done as it says, what changes nothing here, and the rest, which
# must be off.
_USED_KEYS = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights"}
_IRRELEVANT_KEYS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "runtime_config",
}  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, [], {}, "none")
# The other ways to begin take something away from the base's weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Far above any adapter's.
_MAX_RANK = 1 << 20
_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LlavaLoraLayout:
    """Adapters, a projector, and parts ``base`` and ``tower``.

    Attributes:
        newline: Whether the family has tiles, and the vector that ends their rows.
    """

    name: str
    newline: bool = False

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By an adapter's config beside an original LLaVA's."""
        folder = checkpoint.main
        return (folder / ADAPTER_CONFIG).is_file() and is_original(folder, newline=self.newline)

    def read(self, recipe: Recipe, checkpoint: Checkpoint) -> ModelSource:
        """See :class:`gap_export.families.reference.Layout`."""
        folder = checkpoint.main
        adapter = _read_adapter(folder / ADAPTER_CONFIG)
        halves = _index_adapters(folder)
        trained = _index_trained(folder)
        base = read_language_model(checkpoint.part(BASE, recipe))
        config = read_original_config(
            recipe, folder, num_tensors=len(base.weights), newline=self.newline
        )
        # Training may have given the vocabulary more rows, which are then among the trained.
        wanted = replace(config.decoder, vocab_size=base.shape.vocab_size)
        check_base(base, wanted, recipe, role=BASE)
        found = {**base.weights, **trained}
        stored = (*halves.values(), *trained.values())
        return assemble_original(
            recipe,
            checkpoint,
            config,
            {**found, **_merged(adapter, halves, found, config.decoder, folder)},
            layout=self.name,
            files=[
                (MAIN, folder / ADAPTER_CONFIG),
                *((MAIN, file) for file in sorted({weight.file for weight in stored})),
                *((BASE, file) for file in base.files),
            ],
            tokenizers=[folder, base.folder],
        )


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    """What an adapter_config.json says.

    Attributes:
        rank: Of every adapter.
        scale: Of what is added to the base's matrices.
        targets: Last parts of the names of the matrices that have one.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]


def _read_adapter(file: Path) -> _Adapter:
    plain = read_json_object(file)
    _check_adapter(plain, file)
    rank, alpha = plain["r"], plain["lora_alpha"]
    divisor = math.sqrt(rank) if plain.get("use_rslora") else rank
    return _Adapter(rank=rank, scale=alpha / divisor, targets=tuple(plain["target_modules"]))


def _check_adapter(plain: Mapping[str, Any], file: Path) -> None:
    """Refuse whatever makes an adapter something else than B A on plain linear layers."""
    rank, alpha, targets = (plain.get(key) for key in ("r", "lora_alpha", "target_modules"))
    named = isinstance(targets, list) and all(isinstance(t, str) and t for t in targets)
    checks = [
        ("peft_type", plain.get("peft_type") == "LORA", "LORA"),
        ("r", type(rank) is int and 0 < rank <= _MAX_RANK, f"a whole number, 1..{_MAX_RANK}"),
        (
            "lora_alpha",
            isinstance(alpha, int | float) and 0 < alpha <= _MAX_RANK,
            f"a number above 0, up to {_MAX_RANK}",
        ),
        ("use_rslora", plain.get("use_rslora", False) in (True, False), "true or false"),
        ("target_modules", named and bool(targets), "a list of names of linear layers"),
        ("init_lora_weights", plain.get("init_lora_weights") in _PLAIN_STARTS,
         "a start that leaves the base model's weights as they are"),
        *(
            (key, _is_off(value), "off: it is not implemented")
            for key, value in plain.items()
            if key not in _USED_KEYS | _IRRELEVANT_KEYS
        ),
    ]  # fmt: skip
    for key, ok, allowed in checks:
        if not ok:
            raise CheckpointError(
                f"{file}: {key} cannot be used",
                seen=reprlib.repr(plain.get(key)),
                allowed=allowed,
                fix="merge the adapter with peft's merge_and_unload and export what that saves",
            )


def _is_off(value: Any) -> bool:
    # 0 equals False, but is the first layer where layers are numbered.
    return any(type(value) is type(off) and value == off for off in _OFF)


def _index_adapters(folder: Path) -> Mapping[str, Stored]:
    safetensors, pickle = (folder / name for name in _ADAPTER_FILES)
    if safetensors.is_file():
        return index_files([safetensors])
    if pickle.is_file():
        return index_pickle(pickle)
    raise CheckpointError(
        "no adapter weights in the checkpoint folder",
        seen=folder,
        allowed=" or ".join(_ADAPTER_FILES),
        fix="download all files of the checkpoint",
    )


def _index_trained(folder: Path) -> dict[str, Stored]:
    """What was trained as a whole, by our names: the projector, and whatever else replaces."""
    file = folder / _TRAINED_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds no projector",
            seen=f"no {_TRAINED_FILE}",
            allowed=f"{ADAPTER_CONFIG}, the adapter's weights and {_TRAINED_FILE}",
            fix="download all files of the checkpoint",
        )
    found: dict[str, Stored] = {}
    for key, weight in index_pickle(file).items():
        name = key.removeprefix("base_model.model.")
        # One wrapping class more or less, by the version of the training code.
        name = name.removeprefix("model.") if name.startswith("model.model.") else name
        ours = KEYS.canonical(name)
        if ours in found:
            raise CheckpointError(
                f"{file}: two names for one tensor", seen=f"{found[ours].origin} and {key}"
            )
        found[ours] = weight
    return found


def _merged(
    adapter: _Adapter,
    halves: Mapping[str, Stored],
    found: Mapping[str, Weight],
    shape: DecoderShape,
    folder: Path,
) -> dict[str, Weight]:
    """The matrices that have an adapter, by our names, with it merged in."""
    pairs: dict[str, dict[str, Stored]] = {}
    odd: list[str] = []
    for key, weight in halves.items():
        match = _ADAPTER_KEY.fullmatch(key)
        ours = KEYS.canonical(f"{match['module']}.weight") if match is not None else key
        if match is None or match["half"] in pairs.get(ours, ()):
            odd.append(key)
        else:
            pairs.setdefault(ours, {})[match["half"]] = weight
    wanted = _targets(adapter, shape)
    halved = [key for key, pair in pairs.items() if len(pair) != 2]
    problems = [
        ("unexpected", sorted([*odd, *(set(pairs) - set(wanted))])),
        ("without its other half", sorted(halved)),
        ("missing adapters for", sorted(set(wanted) - set(pairs))),
    ]
    _refuse(folder, problems, allowed=f"one adapter for each of {', '.join(adapter.targets)}")
    _check_halves(adapter, pairs, wanted, folder)
    return {
        key: merge_lora(found[key], pair["A"], pair["B"], adapter.scale)
        for key, pair in pairs.items()
    }


def _targets(adapter: _Adapter, shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that the adapter's config names, by our names."""
    endings = tuple(f".{target}.weight" for target in adapter.targets)
    return {
        key: size
        for key, size in expected_decoder(shape).items()
        # lm_head has nothing in front of it; word embeddings are no linear layer.
        if f".{key}".endswith(endings)
        and len(size) == 2
        and not key.startswith("decoder.embed_tokens.")
    }


def _check_halves(
    adapter: _Adapter,
    pairs: Mapping[str, Mapping[str, Stored]],
    wanted: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    wrong: list[str] = []
    for key, pair in pairs.items():
        rows, columns = wanted[key]
        sizes = {"A": (adapter.rank, columns), "B": (rows, adapter.rank)}
        wrong += [
            f"lora_{half} of {key} {weight.dtype} {list(weight.shape)} "
            f"instead of {list(sizes[half])}"
            for half, weight in pair.items()
            if weight.shape != sizes[half] or weight.dtype not in FLOAT_DTYPES
        ]
    _refuse(folder, [("misshaped", wrong)], allowed=f"adapters of rank {adapter.rank}")


def _refuse(folder: Path, problems: Sequence[tuple[str, list[str]]], *, allowed: str) -> None:
    seen = []
    for what, names in problems:
        more = len(names) - _NAMES_SHOWN
        shown = ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        seen += [f"{what} {shown}"] if names else []
    if seen:
        raise CheckpointError(
            f"{folder}: the adapter's tensors do not match {ADAPTER_CONFIG} and the base model",
            seen="; ".join(seen),
            allowed=allowed,
            fix="download all files of the checkpoint, and the base model it was trained on",
        )
