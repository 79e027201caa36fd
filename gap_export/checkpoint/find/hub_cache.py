"""Weights that are on this machine already: in the Hugging Face cache, or in torch's.

Nothing is fetched, ever.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.spec.recipe import CheckpointPart, HubRepository

_MAIN = "main"
# Any folder of weights has one; files that stand alone are asked for by their own name.
_CONFIG = "config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_WHOLE_NAMES = frozenset({"model.safetensors", "pytorch_model.bin"})
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(\w+)-(\d{1,5})-of-(\d{1,5})(\.safetensors|\.bin)", re.ASCII)
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
# Beside it lies what was trained of a model whose tokenizer is another part's.
ADAPTER_CONFIG = "adapter_config.json"
_MAX_JSON_BYTES = 16 << 20

Parts = Mapping[str, CheckpointPart]


@dataclass(frozen=True, kw_only=True)
class PartSearch:
    """What came of looking for a part of a checkpoint in the caches.

    Attributes:
        role: The part's role.
        part: What the recipe says of it; None where it has no such part.
        place: A folder, or a file where the part is one; None where it is not there as a whole.
        unfinished: The first repository whose download was cut short, and the files it lacks.
    """

    role: str
    part: CheckpointPart | None
    place: Path | None = None
    unfinished: tuple[HubRepository, list[str]] | None = None

    def where_looked(self) -> str:
        """Where the part was looked for, in words."""
        from huggingface_hub import constants

        assert self.part is not None, "only a part of the recipe is looked for"
        places = []
        if self.part.repositories:
            names = " or ".join(repository.id for repository in self.part.repositories)
            places.append(f"{names} in {Path(constants.HF_HUB_CACHE)}")
        if self.part.url is not None and self.part.file is not None:
            places.append(f"{self.part.file} in {_torch_cache()}")
        text = " and ".join(places) or "nowhere: it is not published"
        if self.unfinished is None:
            return text
        repository, missing = self.unfinished
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{text} ({repository.id} is there, but without {missing[0]}{more})"

    def how_to_get(self) -> str:
        """How to get the part and how to name it, in words."""
        say = f"say where it is: --checkpoint {self.role}=PATH"
        if self.part is None:
            return say
        if self.unfinished is not None:
            command = _download_command(self.unfinished[0], self.part.file)
            return f"its download was not finished: run `{command}` again, or {say}"
        if self.part.hub is not None:
            return f"get it with `{_download_command(self.part.hub, self.part.file)}`, or {say}"
        return f"get it from {self.part.url}, and {say}" if self.part.url is not None else say


def look_for(role: str, parts: Parts) -> PartSearch:
    """Look for a part that the user has not named.

    Args:
        role: The role of the part.
        parts: All parts of the recipe: where no other is required, main has the tokenizer, too.
    """
    part = parts.get(role)
    if part is None:
        return PartSearch(role=role, part=None)
    place, unfinished = None, None
    for repository in part.repositories:
        found = find_repository(repository, file=part.file)
        missing = [] if found is None else _missing_files(found, role, parts)
        if missing:
            unfinished = unfinished or (repository, missing)
        elif found is not None:
            place = found
            break
    if place is None and part.url is not None and part.file is not None:
        # There the models' own code puts what it fetches by url.
        path = _torch_cache() / part.file
        place = path if path.is_file() else None
    return PartSearch(role=role, part=part, place=place, unfinished=unfinished)


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
    except HFValidationError:  # no repository can have that name
        return None
    # Else None, or a mark that the repository is known to have no such file.
    if not isinstance(found, str):
        return None
    return Path(found) if file is not None else Path(found).parent


def _download_command(repository: HubRepository, file: str | None) -> str:
    words = ["hf download", repository.id]
    if file is not None:
        words.append(file)
    if repository.kind != "model":
        words.append(f"--repo-type {repository.kind}")
    if repository.revision != "main":
        words.append(f"--revision {repository.revision}")
    return " ".join(words)


def _missing_files(place: Path, role: str, parts: Parts) -> list[str]:
    """Files that a folder should have, of weights or a tokenizer; a file has all it should.

    A download that was cut short leaves a snapshot with some of its files.
    """
    if place.is_file():
        return []
    # A link to a blob that is gone is no file.
    names = {path.name for path in place.iterdir() if path.is_file()}
    missing = _missing_weights(place, names)
    alone = not any(other.required for name, other in parts.items() if name != role)
    has_tokenizer = role == _MAIN and alone and ADAPTER_CONFIG not in names
    if has_tokenizer and not names.intersection(_TOKENIZER_NAMES):
        missing.append(" or ".join(_TOKENIZER_NAMES))
    return missing


def _missing_weights(folder: Path, names: set[str]) -> list[str]:
    for index in _INDEX_NAMES:
        if index in names:
            # A broken index names no shards here, and is refused when the weights are read.
            found = read_object(folder / index).get("weight_map")
            files = found.values() if isinstance(found, dict) else ()
            return sorted({name for name in files if isinstance(name, str)} - names)
    if names & _WHOLE_NAMES:
        return []
    shards = [shard for shard in map(_SHARD.fullmatch, sorted(names)) if shard is not None]
    if shards:
        stem, number, total, suffix = shards[0].groups()
        wanted = [f"{stem}-{n:0{len(number)}}-of-{total}{suffix}" for n in range(1, int(total) + 1)]
        return [name for name in (*wanted, f"{stem}{suffix}.index.json") if name not in names]
    return [] if any(name.endswith(_WEIGHT_SUFFIXES) for name in names) else ["weights"]


def read_object(file: Path) -> Mapping[str, Any]:
    """A JSON object; empty where a file is none, which its reader will say."""
    try:
        with file.open("rb") as stream:
            plain = json.loads(stream.read(_MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _torch_cache() -> Path:
    """Where torch.hub keeps files, by torch's own rules; torch itself may be missing."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints"  # noqa: PTH111 - never raises
