"""Matching a checkpoint's tensors with those a model must have."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from gap_export.checkpoint.find.foreign import describe_config, quantized, quantizer_of
from gap_export.checkpoint.weights import FLOAT_DTYPES, Weight, read_json_object
from gap_export.checkpoint.weights.files import some
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.limits import check_extent, check_values

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)
WeightT = TypeVar("WeightT", bound=Weight)

_MAX_REASON = 300
# Classifiers have these, and no model here is one; transformers makes num_labels names.
_LABEL_KEYS = frozenset({"num_labels", "id2label", "label2id"})


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
    tied: Mapping[str, str] = field(default_factory=dict)

    def tying(self, *, head: bool) -> KeyLayout:
        """The same, where the head may be left out if it is the word embeddings."""
        return replace(self, tied={"lm_head.weight": "decoder.embed_tokens.weight"} if head else {})

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
        num_tensors: Number of tensors there are; the config may not claim more layers.

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
    return build_config(cls, plain, file, num_tensors=num_tensors)


def build_config(
    cls: type[ConfigT], plain: Mapping[str, Any], file: Path, *, num_tensors: int
) -> ConfigT:
    """Check what a config.json says, and parse it as a kind of our choice.

    Args:
        cls: The kind to read it as.
        plain: The content of ``file``, or the part of it that is meant.
        file: Named in messages.
        num_tensors: Number of tensors there are; the config may not claim more layers.

    Raises:
        CheckpointError: a value that no model can have, or not valid.
    """
    unlabelled = _without_labels(plain)
    check_extent(unlabelled, file)
    check_values(unlabelled, file, max_layers=num_tensors)
    try:
        config: ConfigT = cls.from_dict(unlabelled)
    except (
        *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
        StrictDataclassError,
    ) as err:
        reason = f"{file}: {err}"[:_MAX_REASON]
        raise CheckpointError("config.json does not parse", seen=reason) from err
    return config


def check_config_readable(folder: Path) -> None:
    """See that a config.json, where there is one, is a JSON object.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        read_json_object(folder / "config.json")
    except CheckpointError as err:
        # A folder without one may hold what needs none; so may a file, in place of a folder.
        if not isinstance(err.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise


def model_type_of(folder: Path, section: str | None = None) -> str | None:
    """The ``model_type`` of a folder's config.json, or of a config that it nests; None without."""
    plain = peek_config(folder)
    found = plain if section is None else plain.get(section)
    kind = found.get("model_type") if isinstance(found, Mapping) else None
    return kind if isinstance(kind, str) else None


def peek_config(folder: Path) -> Mapping[str, Any]:
    """A folder's config.json, to recognize it by; empty where there is none that can be read."""
    try:
        return read_json_object(folder / "config.json")
    except CheckpointError:
        return {}


def look_at(folder: Path) -> str:
    """What a folder seems to be, in words, for a message."""
    if folder.is_file():
        return f"a file, {folder.name}"
    file = folder / "config.json"
    try:
        check_config_readable(folder)
    except CheckpointError as err:
        return f"config.json that cannot be read: {err.seen}"
    try:
        if file.is_file():
            return describe_config(folder) or "a config.json that names no model"
        names = sorted(path.name for path in folder.iterdir())
    except OSError as err:
        return str(err)
    return f"a folder without config.json: {some(names)}" if names else "an empty folder"


def main_dtype(weights: Mapping[str, Weight]) -> str:
    """The dtype that most of the decoder is held in: float32, float16 or bfloat16."""
    sizes: dict[str, int] = {}
    for key, weight in weights.items():
        if key.startswith("decoder."):
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + math.prod(weight.shape)
    return FLOAT_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]


def match_tensors(
    found: Mapping[str, WeightT],
    expected: Mapping[str, tuple[int, ...]],
    layout: KeyLayout,
    *,
    where: Path,
    sizes_of: str = "config.json",
) -> dict[str, WeightT]:
    """Pair every expected tensor with its bytes.

    Args:
        found: By name in the files.
        expected: Shape by our name.
        layout: Turns one kind of name into the other.
        where: Named in messages.
        sizes_of: What says the sizes, for messages.

    Returns:
        What was found, by our name, one for each expected tensor.

    Raises:
        CheckpointError: tensors are missing, unexpected, there twice, mis-shaped, or of a dtype
            that is not supported.
    """
    refs: dict[str, WeightT] = {}
    for key, ref in found.items():
        if key.endswith(layout.ignored_suffixes or ("\0",)):
            continue
        ours = layout.canonical(key)
        if ours in refs:
            raise CheckpointError(
                f"{where}: two names for one tensor", seen=f"{refs[ours].origin} and {key}"
            )
        refs[ours] = ref
    for key, source in layout.tied.items():
        if source in refs:
            refs.setdefault(key, refs[source])
    _check_keys(refs, expected, where, sizes_of)
    _check_tensors(refs, expected, where, sizes_of)
    return refs


def _without_labels(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and the configs in it, without the names of classes."""
    kept = {key: value for key, value in plain.items() if key not in _LABEL_KEYS}
    nested = {
        key: {name: inner for name, inner in value.items() if name not in _LABEL_KEYS}
        for key, value in kept.items()
        if isinstance(value, dict)
    }
    return {**kept, **nested}


def _check_keys(refs: Iterable[str], expected: Iterable[str], where: Path, sizes_of: str) -> None:
    missing = sorted(set(expected) - set(refs))
    unexpected = sorted(set(refs) - set(expected))
    if not missing and not unexpected:
        return
    quantizer = quantizer_of(unexpected)
    if quantizer is not None:
        raise quantized(quantizer, f"{where}: {some(unexpected)}")
    parts = [
        f"{word} {some(keys)}"
        for word, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    raise CheckpointError(
        f"{where}: tensors do not match the model's config",
        seen=", ".join(parts),
        allowed=f"exactly the tensors of the architecture in {sizes_of}",
        fix=f"check that {sizes_of} belongs to these weights",
    )


def _check_tensors(
    refs: Mapping[str, Weight],
    expected: Mapping[str, tuple[int, ...]],
    where: Path,
    sizes_of: str,
) -> None:
    wrong = [
        f"{key} {list(refs[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if refs[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: tensors of the wrong shape",
            seen=some(wrong),
            fix=f"check that {sizes_of} belongs to these weights",
        )
    dtypes = sorted({refs[key].dtype for key in expected} - set(FLOAT_DTYPES))
    if any(dtype.startswith(("F4", "F8", "I8", "U8")) for dtype in dtypes):
        raise quantized("at most 8 bits", f"{where}: weights of dtype {', '.join(dtypes)}")
    if dtypes:
        raise CheckpointError(
            f"{where}: weights of a dtype that is not supported",
            seen=", ".join(dtypes),
            allowed=", ".join(FLOAT_DTYPES),
            fix="load the model with transformers as float32 and save it again",
        )
