"""Weights that are on this machine already: in the Hugging Face cache, or in torch's.

Nothing is fetched, ever.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from gap_export.recipe import CheckpointPart, HubRepository

# Any folder of weights has one; files that stand alone are asked for by their own name.
_CONFIG = "config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_INDEX_BYTES = 16 << 20


def find_part(part: CheckpointPart) -> Path | None:
    """Where a part lies, complete, without anybody saying so; None where it does not.

    A folder, or a file where the part is one.
    """
    for repository in part.repositories:
        found = find_repository(repository, file=part.file)
        if found is not None and not _missing_files(found):
            return found
    if part.url is not None and part.file is not None:
        # There the models' own code puts what it fetches by url.
        path = _torch_cache() / part.file
        return path if path.is_file() else None
    return None


def find_repository(repository: HubRepository, *, file: str | None = None) -> Path | None:
    """A repository's snapshot in the hub's cache, complete or not, or one file of it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(
            repository.id,
            file or _CONFIG,
            revision=repository.revision,
            repo_type=repository.kind,
        )
    except HFValidationError:  # a name that the hub gives to nobody
        return None
    # Else None, or a mark that the repository is known to have no such file.
    if not isinstance(found, str):
        return None
    return Path(found) if file is not None else Path(found).parent


def where_looked(part: CheckpointPart) -> str:
    """Where a part is looked for by itself, in words."""
    places = []
    if part.repositories:
        names = " or ".join(repository.id for repository in part.repositories)
        places.append(f"{names} in {_hub_cache()}")
    if part.url is not None and part.file is not None:
        places.append(f"{part.file} in {_torch_cache()}")
    text = " and ".join(places) or "nowhere: nobody publishes it"
    missing = _missing_of(part)
    return f"{text} (there, but without {', '.join(missing)})" if missing else text


def how_to_get(role: str, part: CheckpointPart | None) -> str:
    """How to get a part and how to name it, in words."""
    flag = f"--checkpoint {role}=PATH"
    if part is None:
        return f"say where it is: {flag}"
    if part.hub is not None:
        return f"get it with `{_download_command(part.hub, part.file)}`, or say where it is: {flag}"
    if part.url is not None:
        return f"get it from {part.url}, and say where it is: {flag}"
    return f"say where it is: {flag}"


def _download_command(repository: HubRepository, file: str | None) -> str:
    words = ["hf download", repository.id]
    if file is not None:
        words.append(file)
    if repository.kind != "model":
        words.append(f"--repo-type {repository.kind}")
    if repository.revision != "main":
        words.append(f"--revision {repository.revision}")
    return " ".join(words)


def _missing_of(part: CheckpointPart) -> list[str]:
    """What the first of a part's repositories that is there lacks."""
    for repository in part.repositories:
        found = find_repository(repository, file=part.file)
        if found is not None:
            return _missing_files(found)
    return []


def _missing_files(place: Path) -> list[str]:
    """Weight files that a folder should have; a file has all it should.

    A download that was cut short leaves a snapshot with some of its shards.
    """
    if place.is_file():
        return []
    names = {path.name for path in place.iterdir() if path.is_file()}
    for index in _INDEX_NAMES:
        if index in names:
            missing = sorted(_indexed_files(place / index) - names)
            return [f"{missing[0]} and {len(missing) - 1} more"] if len(missing) > 1 else missing
    if not any(name.endswith(_WEIGHT_SUFFIXES) for name in names):
        return ["weights"]
    return []


def _indexed_files(index: Path) -> set[str]:
    """Names of shards; a broken index names none here, and is refused when the weights are read."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            return set()
        plain = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    weight_map = plain.get("weight_map") if isinstance(plain, dict) else None
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    return {name for name in files if isinstance(name, str)}


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _torch_cache() -> Path:
    """Where torch.hub keeps files, by torch's own rules; torch itself may be missing."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints"  # noqa: PTH111 - never raises
