"""LoRA adapters as peft saves them: merged into the matrices they belong to, or refused by name.

What is applied is what lies in the adapter's file: ``W + scale * B A`` for each pair, where scale
is alpha / r (alpha / sqrt(r) with ``use_rslora``), and every other tensor in place of the model's
own (``modules_to_save``). A list of target modules is held against the file; a regular expression
is not, since it is written for the names of one version of transformers.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gap_export.checkpoint.find.hub_cache import ADAPTER_CONFIG
from gap_export.checkpoint.find.source import MAIN
from gap_export.checkpoint.weights import (
    FLOAT_DTYPES,
    Weight,
    index_files,
    index_pickle,
    merge_lora,
    read_json_object,
)
from gap_export.checkpoint.weights.files import some
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.matching import KeyLayout
from gap_export.families.common.checkpoints.parts import Stored
from gap_export.families.common.reference import ModelSource

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# Newer versions of peft name the adapter, which is the default one.
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
# The matrix or bias of a module that has an adapter.
_WRAPPED = ".base_layer."
# Keys of adapter_config.json that change nothing here; what else is not read must be off.
_IRRELEVANT_KEYS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "runtime_config",
}  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, [], {}, "none")
# Far above any adapter's.
_MAX_RANK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MergedAdapter:
    """What an adapter changes.

    Attributes:
        weights: The changed weights, by our names.
        files: Its config, and the file of its tensors.
        note: What was done, in a sentence for the user.
    """

    weights: Mapping[str, Weight]
    files: tuple[Path, ...]
    note: str


def with_adapter(source: ModelSource, folder: Path, keys: KeyLayout) -> ModelSource:
    """A model with the adapter that lies in its folder, as ``from_pretrained`` loads it.

    Args:
        source: A whole model.
        folder: Its main part.
        keys: Turns names of tensors in the folder into ours.

    Returns:
        The very source where there is no adapter.

    Raises:
        CheckpointError: an adapter that is not implemented, or does not fit the model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return source
    merged = merge_adapter(folder, source.weights, keys)
    return replace(
        source,
        weights={**source.weights, **merged.weights},
        files=(*source.files, *((MAIN, file) for file in merged.files)),
        notes=(*source.notes, merged.note),
    )


def merge_adapter(folder: Path, found: Mapping[str, Weight], keys: KeyLayout) -> MergedAdapter:
    """Merge the adapter of a folder into a model's weights; nothing is loaded yet.

    Args:
        folder: Holds adapter_config.json and the adapter's tensors.
        found: The model's weights, by our names.
        keys: Turns the names of modules in the adapter's file into ours.

    Raises:
        CheckpointError: an adapter that is not implemented, or does not fit the model.
    """
    adapter = _Adapter.read(folder / ADAPTER_CONFIG)
    tensors, targets = _index_adapter(folder), adapter.target_modules
    targets = [targets] if isinstance(targets, str) else targets
    pairs, others = _sort(tensors, keys)
    complete = {key: pair for key, pair in pairs.items() if set(pair.halves) == {"A", "B"}}
    linear = {key for key, weight in found.items() if _is_linear(key, weight)}
    replaced, odd = _replaced(others, pairs, found, keys)
    odd += [key for key, pair in pairs.items() if key not in linear or not adapter.wants(pair)]
    _refuse(
        folder,
        [
            ("unexpected", sorted(odd)),
            ("without its other half", sorted(set(pairs) - set(complete))),
            ("missing adapters for", sorted(_lacking(adapter, linear, pairs))),
            ("missing modules_to_save", adapter.unsaved([name for name, _ in others])),
            ("no pair of lora_A and lora_B among", [] if pairs else sorted(tensors)),
        ],
        allowed=f"one adapter for each of {', '.join(targets)}",
    )
    base = {**found, **replaced}
    _check_shapes(adapter, complete, replaced, found, folder)
    merged = {
        key: merge_lora(base[key], pair.halves["A"], pair.halves["B"], adapter.scale(pair.module))
        for key, pair in complete.items()
    }
    files = sorted({weight.file for weight in tensors.values()})
    saved = f", and {len(replaced)} tensors replaced" if replaced else ""
    return MergedAdapter(
        weights={**replaced, **merged},
        files=(folder / ADAPTER_CONFIG, *files),
        note=f"the adapter in {folder} is merged: LoRA of rank {adapter.r} for {len(merged)} "
        f"matrices{saved}",
    )


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The adapter of one module, by its name in the file; one half may be missing."""

    module: str
    halves: dict[str, Stored]


_Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=_MAX_RANK)]
_Name = Annotated[str, Field(min_length=1)]
# Plain names alone: peft reads them as regular expressions, which are not run here.
_End = Annotated[str, Field(pattern=r"^[\w.]+$")]
_A_RANK, _AN_ALPHA = f"a whole number, 1..{_MAX_RANK}", f"a number above 0, up to {_MAX_RANK}"


class _Adapter(BaseModel):
    """What an adapter_config.json says, by peft's names; a description is what is allowed.

    Anything that makes an adapter something else than B A on plain linear layers is refused.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    peft_type: Literal["LORA"] = Field(description="LORA")
    r: _Rank = Field(description=_A_RANK)
    lora_alpha: _Alpha = Field(description=_AN_ALPHA)
    use_rslora: bool = Field(default=False, description="true or false")
    target_modules: _Name | Annotated[list[_Name], Field(min_length=1)] = Field(
        description="a list of names of linear layers, or a regular expression"
    )
    modules_to_save: list[_Name] | None = Field(
        default=None, description="a list of names of modules"
    )
    rank_pattern: dict[_End, _Rank] | None = Field(
        default=None, description=f"for names of modules {_A_RANK}"
    )
    alpha_pattern: dict[_End, _Alpha] | None = Field(
        default=None, description=f"for names of modules {_AN_ALPHA}"
    )
    # The other ways to begin take something away from the base's weights.
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "eva"] | None = Field(
        default=None, description="a start that leaves the base model's weights as they are"
    )

    @classmethod
    def read(cls, file: Path) -> _Adapter:
        """Read a config.

        Raises:
            CheckpointError: a value that cannot be used, or a switch that is not known and on.
        """
        plain = read_json_object(file)
        wrong: tuple[str, str] | None = None
        try:
            adapter = cls.model_validate(plain)
        except ValidationError as err:
            key = str(err.errors()[0]["loc"][0])
            wrong = key, str(cls.model_fields[key].description)
        else:
            for key in adapter.model_extra or {}:
                # 0 equals False, but is the first layer where layers are numbered.
                is_off = any(type(plain[key]) is type(off) and plain[key] == off for off in _OFF)
                if not is_off and key not in _IRRELEVANT_KEYS:
                    wrong = key, "off: it is not implemented"
        if wrong is None:
            return adapter
        raise CheckpointError(
            f"{file}: {wrong[0]} cannot be used",
            seen=reprlib.repr(plain.get(wrong[0])),
            allowed=wrong[1],
            fix="merge the adapter with peft's merge_and_unload and export what that saves",
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter, by its name in the file."""
        ranks = self.rank_pattern or {}
        return next((rank for end, rank in ranks.items() if _ends(module, end)), self.r)

    def scale(self, module: str) -> float:
        """By what B A is multiplied before it is added to a module's matrix."""
        alphas = self.alpha_pattern or {}
        alpha = next((a for end, a in alphas.items() if _ends(module, end)), self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def wants(self, pair: _Pair) -> bool:
        """Whether the config names a module."""
        targets = self.target_modules
        return isinstance(targets, str) or any(_ends(pair.module, end) for end in targets)

    def unsaved(self, names: Sequence[str]) -> list[str]:
        """The modules that should have been saved, and of which the file holds no tensor."""
        modules = [f".{name.rpartition('.')[0]}." for name in names]
        saved = self.modules_to_save or ()
        return [end for end in saved if not any(f".{end}." in module for module in modules)]


def _ends(module: str, end: str) -> bool:
    return f".{module}".endswith(f".{end}")


def _is_linear(key: str, weight: Weight) -> bool:
    """Whether it is the matrix of a linear layer: word and position embeddings are none."""
    return key.endswith(".weight") and len(weight.shape) == 2 and "embed" not in key


def _index_adapter(folder: Path) -> Mapping[str, Stored]:
    safetensors, pickle = (folder / name for name in ADAPTER_FILES)
    if safetensors.is_file():
        return index_files([safetensors])
    if pickle.is_file():
        return index_pickle(pickle)
    raise CheckpointError(
        "no adapter weights in the checkpoint folder",
        seen=f"{folder}: {ADAPTER_CONFIG} without them",
        allowed=" or ".join(ADAPTER_FILES),
        fix=f"download all files of the checkpoint, or take {ADAPTER_CONFIG} away",
    )


def _sort(
    tensors: Mapping[str, Stored], keys: KeyLayout
) -> tuple[dict[str, _Pair], list[tuple[str, Stored]]]:
    """The pairs by our names of their matrices, and all else by names without peft's prefix."""
    pairs: dict[str, _Pair] = {}
    others: list[tuple[str, Stored]] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _HALF.fullmatch(name) if name != key else None
        ours = keys.canonical(f"{match['module']}.weight") if match is not None else None
        if match is None or (ours in pairs and match["half"] in pairs[ours].halves):
            others.append((name, tensor))
        elif ours is not None:
            pair = pairs.setdefault(ours, _Pair(module=match["module"], halves={}))
            pair.halves[match["half"]] = tensor
    return pairs, others


def _replaced(
    others: Sequence[tuple[str, Stored]],
    pairs: Mapping[str, _Pair],
    found: Mapping[str, Weight],
    keys: KeyLayout,
) -> tuple[dict[str, Weight], list[str]]:
    """What goes in place of the model's own, by our names, and what goes nowhere."""
    replaced: dict[str, Weight] = {}
    odd: list[str] = []
    for name, tensor in others:
        ours = keys.canonical(name.replace(_WRAPPED, "."))
        has_pair = f"{ours.rpartition('.')[0]}.weight" in pairs
        # peft wraps the modules that have an adapter, and those alone.
        if ours in found and ours not in replaced and has_pair == (_WRAPPED in name):
            replaced[ours] = tensor
        else:
            odd.append(tensor.key)
    return replaced, odd


def _lacking(adapter: _Adapter, linear: set[str], pairs: Mapping[str, _Pair]) -> set[str]:
    """Matrices that the config names and that have no adapter, in the parts that have any."""
    if isinstance(adapter.target_modules, str):
        return set()
    parts = {_part(key) for key in pairs}
    wanted = {key for key in linear if _part(key) in parts}
    ends = [f"{target}.weight" for target in adapter.target_modules]
    return {key for key in wanted if any(_ends(key, end) for end in ends)} - set(pairs)


def _part(key: str) -> str:
    part = key.partition(".")[0]
    return "decoder" if part == "lm_head" else part


def _check_shapes(
    adapter: _Adapter,
    pairs: Mapping[str, _Pair],
    replaced: Mapping[str, Weight],
    found: Mapping[str, Weight],
    folder: Path,
) -> None:
    wanted: list[tuple[str, Weight, tuple[int, ...]]] = [
        (key, weight, found[key].shape) for key, weight in replaced.items()
    ]
    for key, pair in pairs.items():
        rank, (rows, columns) = adapter.rank_of(pair.module), found[key].shape
        sizes = {"A": (rank, columns), "B": (rows, rank)}
        wanted += [
            (f"lora_{half} of {key}", weight, sizes[half]) for half, weight in pair.halves.items()
        ]
    wrong = [
        f"{name} {weight.dtype} {list(weight.shape)} instead of {list(size)}"
        for name, weight, size in wanted
        if weight.shape != size or weight.dtype not in FLOAT_DTYPES
    ]
    _refuse(folder, [("misshaped", wrong)], allowed=f"adapters of rank {adapter.r}")


def _refuse(folder: Path, problems: Sequence[tuple[str, list[str]]], *, allowed: str) -> None:
    seen = [f"{what} {some(names)}" for what, names in problems if names]
    if seen:
        raise CheckpointError(
            f"{folder}: the adapter's tensors do not match {ADAPTER_CONFIG} and the base model",
            seen="; ".join(seen),
            allowed=allowed,
            fix="download all files of the checkpoint, and the base model it was trained on",
        )
