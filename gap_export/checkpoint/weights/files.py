"""What the readers of all formats share: bounded JSON, indexes of shards, words for bad files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gap_export.errors import CheckpointError

_Stored = TypeVar("_Stored")

# A config.json takes kilobytes, the index of a 70B model half a megabyte.
_MAX_JSON_BYTES = 16_000_000
_LFS_POINTER = b"version https://git-lfs"
_NAMES_SHOWN = 5
_MAX_SHOWN = 300
# No tensor of a model has such a name or shape; a message that has them stays short.
MAX_KEY = 1000
MAX_RANK = 16
# No file system we know has longer names.
_MAX_NAME_BYTES = 255


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint, such as its config.json.

    Raises:
        CheckpointError: missing, unreadable, larger than 16 MB, or not a JSON object.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_JSON_BYTES + 1)
    except FileNotFoundError as err:
        raise CheckpointError("checkpoint file not found", seen=file) from err
    except OSError as err:
        raise CheckpointError("checkpoint file cannot be read", seen=f"{file}: {err}") from err
    if len(raw) > _MAX_JSON_BYTES:
        raise damaged(file, f"more than {_MAX_JSON_BYTES} bytes of JSON")
    return parse_json_object(file, raw)


def parse_json_object(file: Path, raw: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no key occurs twice.

    Args:
        file: Named in messages.
        raw: UTF-8.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as err:
        raise damaged(file, f"JSON does not parse: {err}") from err
    if not isinstance(parsed, dict):
        raise damaged(file, f"a JSON {type(parsed).__name__} where an object belongs")
    return parsed


def shard_files(index: Path, *, suffix: str) -> tuple[Path, ...]:
    """The weight files that an ``*.index.json`` names, all of which are there.

    Args:
        index: The index, in the folder of its shards.
        suffix: How their names end, e.g. ``.safetensors``.

    Raises:
        CheckpointError: the index is damaged or names files elsewhere, or shards are missing.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged(index, "no weight_map of file names")
    names = sorted(set(weight_map.values()))
    if not names:
        raise damaged(index, "a weight_map that names no file")
    for name in names:
        # An index must not make us read files outside its folder.
        if Path(name).name != name or "\0" in name or not name.endswith(suffix):
            raise damaged(index, f"weight file named {name!r}")
        if len(name.encode(errors="surrogatepass")) > _MAX_NAME_BYTES:
            raise damaged(index, f"weight file with a name of {len(name)} characters")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the checkpoint's {len(names)} weight files "
            f"{'is' if len(missing) == 1 else 'are'} missing in {index.parent}",
            seen=some(missing),
            fix=f"download what is missing into that folder; {index.name} lists all of them",
        )
    return tuple(index.parent / name for name in names)


def join_files(
    files: Iterable[Path], read: Callable[[Path], Mapping[str, _Stored]]
) -> dict[str, _Stored]:
    """Every tensor of several files, by name.

    Raises:
        CheckpointError: two of them hold one name, or what ``read`` raises.
    """
    found: dict[str, tuple[Path, _Stored]] = {}
    for file in files:
        for key, tensor in read(file).items():
            if key in found:
                raise CheckpointError(
                    "a tensor is in two weight files",
                    seen=f"{key} in {found[key][0].name} and {file.name}",
                )
            found[key] = file, tensor
    return {key: tensor for key, (_, tensor) in found.items()}


def damaged(file: Path, seen: str) -> CheckpointError:
    """The error for a file that is not what it should be; what was seen may be of any length."""
    shown = seen if len(seen) <= _MAX_SHOWN else f"{seen[:_MAX_SHOWN]}..."
    return CheckpointError(
        "a file of the checkpoint is damaged or not what it should be",
        seen=f"{file}: {shown}",
        fix="download or save the checkpoint again",
    )


def check_no_pointer(file: Path, start: bytes) -> None:
    """Refuse the stand-in that a clone without Git LFS has for every large file.

    Args:
        file: Named in the message.
        start: Its first bytes, some dozens.

    Raises:
        CheckpointError: it is one.
    """
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(
            "the weight file is a Git LFS pointer, not the weights",
            seen=file,
            fix="run `git lfs pull` in the clone, or download the file",
        )


def some(names: list[str]) -> str:
    """Names for a message, not too many."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    plain = dict(pairs)
    if len(plain) != len(pairs):
        raise ValueError("a key occurs twice")
    return plain
