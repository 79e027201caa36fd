"""Matching a checkpoint's tensors with a model's, and filling modules for the PyTorch reference."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from gap_export.errors import CheckpointError
from gap_export.families.limits import check_values
from gap_export.families.reference import Component
from gap_export.weights import TensorRef, read_json_object, read_tensor

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)

# More than this many names in one message hide the point.
_NAMES_SHOWN = 6
_DTYPES = ("F32",)
_MAX_REASON = 300


@dataclass(frozen=True, kw_only=True)
class KeyLayout:
    """How a family's checkpoints name tensors.

    Attributes:
        prefixes: (prefix in the file, our prefix), the first that fits wins.
        ignored_suffixes: Tensors that some versions wrote though they hold no weight.
        tied: For a tensor that may be left out, the one whose bytes it shares.
    """

    prefixes: tuple[tuple[str, str], ...]
    ignored_suffixes: tuple[str, ...] = ()
    tied: Mapping[str, str]

    def canonical(self, key: str) -> str:
        """Our name of a tensor in a file."""
        for theirs, ours in self.prefixes:
            if key.startswith(theirs):
                return ours + key[len(theirs) :]
        return key


def parse_config(cls: type[ConfigT], file: Path, *, num_tensors: int) -> ConfigT:
    """Read a config.json as the one kind it may be.

    Args:
        cls: The kind.
        file: The config.json.
        num_tensors: Of the checkpoint; it bounds how many layers the config may claim.

    Raises:
        CheckpointError: missing, not JSON, of another ``model_type``, with a value that no model
            can have, or not valid.
    """
    plain = read_json_object(file)
    if plain.get("model_type") != cls.model_type:
        raise CheckpointError(
            f"{file} is of another architecture",
            seen=f"model_type {reprlib.repr(plain.get('model_type'))}",
            allowed=repr(cls.model_type),
            fix="use the recipe of that model, or the checkpoint of this one",
        )
    check_values(plain, file, max_layers=num_tensors)
    try:
        config: ConfigT = cls.from_dict(plain)
    except (
        *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
        StrictDataclassError,
    ) as err:
        reason = f"{file}: {err}"[:_MAX_REASON]
        raise CheckpointError("config.json does not parse", seen=reason) from err
    return config


def match_tensors(
    found: Mapping[str, TensorRef],
    expected: Mapping[str, tuple[int, ...]],
    layout: KeyLayout,
    *,
    where: Path,
) -> dict[str, TensorRef]:
    """Pair every expected tensor with its bytes.

    Args:
        found: By name in the files.
        expected: Shape by our name.
        layout: Turns one kind of name into the other.
        where: Named in messages.

    Returns:
        References by our name, one for each expected tensor.

    Raises:
        CheckpointError: tensors are missing, unexpected, there twice, mis-shaped, or of a dtype
            that is not supported.
    """
    refs: dict[str, TensorRef] = {}
    for key, ref in found.items():
        if key.endswith(layout.ignored_suffixes or ("\0",)):
            continue
        ours = layout.canonical(key)
        if ours in refs:
            raise CheckpointError(
                f"{where}: two names for one tensor", seen=f"{refs[ours].key} and {key}"
            )
        refs[ours] = ref
    for key, source in layout.tied.items():
        if source in refs:
            refs.setdefault(key, refs[source])
    _check_keys(refs, expected, where)
    _check_tensors(refs, expected, where)
    return refs


def fill_module(component: Component) -> None:
    """Give a meta module its weights and constants, on the CPU, in place.

    Raises:
        CheckpointError: a weight cannot be read.
    """
    module = component.module
    weights = {k: torch.from_numpy(read_tensor(r)) for k, r in component.weight_refs.items()}
    module.load_state_dict(weights, strict=True, assign=True)
    module.requires_grad_(False)
    module.eval()
    for name, value in component.constants.items():
        owner, _, leaf = name.rpartition(".")
        buffer = torch.from_numpy(value.copy())
        module.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a module's state dict."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _check_keys(refs: Iterable[str], expected: Iterable[str], where: Path) -> None:
    missing = sorted(set(expected) - set(refs))
    unexpected = sorted(set(refs) - set(expected))
    if not missing and not unexpected:
        return
    parts = [
        f"{word} {_some(keys)}"
        for word, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    raise CheckpointError(
        f"{where}: tensors do not match the model's config",
        seen=", ".join(parts),
        allowed="exactly the tensors of the architecture in config.json",
        fix="check that config.json belongs to these weights",
    )


def _check_tensors(
    refs: Mapping[str, TensorRef], expected: Mapping[str, tuple[int, ...]], where: Path
) -> None:
    wrong = [
        f"{key} {list(refs[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if refs[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: tensors of the wrong shape",
            seen=_some(wrong),
            fix="check that config.json belongs to these weights",
        )
    dtypes = sorted({refs[key].dtype for key in expected} - set(_DTYPES))
    if dtypes:
        raise CheckpointError(
            f"{where}: weights of a dtype that is not supported",
            seen=", ".join(dtypes),
            allowed=", ".join(_DTYPES),
            fix="load the model with transformers as float32 and save it again",
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
