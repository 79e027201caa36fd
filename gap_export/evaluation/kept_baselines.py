"""Unpruned bundles that evaluations export, kept for the next one that needs the same.

A bundle is found again by all that makes it: the bytes of the checkpoint, the recipe, how it is
exported, and the code that does it. One that is damaged or out of date is made anew; to forget all,
remove the folder ``baselines`` of the cache. An evaluation locks those that it uses, so that no
other removes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export.bundle import open_bundle
from gap_export.bundle.drafts import try_lock
from gap_export.bundle.stamps import cache_folder
from gap_export.errors import GapExportError, OutputError
from gap_export.exporting import ExportOptions
from gap_export.spec.manifest import SourceSpec
from gap_export.spec.recipe import Recipe

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

# What kept bundles may take beside linked weights; those not used for longest go first.
_MAX_BYTES = 4 * 2**30
# Options that change nothing in an unpruned bundle's files, or that the recipe, the checkpoint's
# files and the code say.
_ELSEWHERE = frozenset(
    "model pruning out force recipe checkpoint calibration copy_weights random_weights".split()
)
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy", "tokenizers")


class KeptBaselines:
    """Bundles of one evaluation that are looked up before they are made; a context manager.

    Args:
        scratch: Where those are made that are not kept.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        # Descriptors of the folders of what is in use, which are locked.
        self._used: list[int] = []
        cached = cache_folder()
        # The code of other packages is not part of a key.
        others = any(group.startswith("gap_export.") for group in entry_points().groups)
        self._folder = None if cached is None or others else cached / "baselines"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of what was used, and remove what is too much."""
        while self._used:
            os.close(self._used.pop())
        self.tidy()

    def find_or_make(
        self,
        recipe: Recipe,
        source: SourceSpec,
        options: ExportOptions,
        name: str,
        make: Callable[[Path], Path],
    ) -> Path:
        """The bundle's folder.

        Args:
            recipe: What the model is.
            source: The checkpoint's files.
            options: How it is exported.
            name: Of its folder, where it is not kept.
            make: Exports it into a folder that is not there yet, and says where it is.

        Raises:
            GapExportError: it cannot be exported.
        """
        if self._folder is None:
            return make(self._scratch / name)
        path = self._folder / _key(recipe, source, options)
        if self._take(path):
            return path
        _remove_unused(path)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            make(path)
        except (OSError, OutputError) as err:
            # Another evaluation was faster, or nothing can be written there.
            logger.info("baseline %s is not made there: %s", path, err)
        return path if self._take(path) else make(self._scratch / name)

    def _take(self, path: Path) -> bool:
        """Lock a baseline for as long as this evaluation lasts; False where it is not whole."""
        descriptor = _lock(path, shared=True)
        if descriptor is None:
            return False
        # Another evaluation may have made it anew between the two.
        if not _is_whole(path) or not os.path.samestat(os.fstat(descriptor), path.stat()):
            os.close(descriptor)
            return False
        self._used.append(descriptor)
        return True

    def tidy(self) -> None:
        """Remove what is too much and that no evaluation uses, the least recently used first."""
        if self._folder is None or not self._folder.is_dir():
            return
        kept = [path for path in self._folder.iterdir() if path.is_dir()]
        sizes = {path: _own_bytes(path) for path in kept}
        for path in sorted(kept, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) <= _MAX_BYTES:
                break
            if _remove_unused(path):
                del sizes[path]


def _lock(path: Path, *, shared: bool) -> int | None:
    """See try_lock; what cannot be opened is not locked."""
    try:
        return try_lock(path, shared=shared)
    except OSError as err:
        logger.debug("%s is not locked: %s", path, err)
        return None


def _remove_unused(path: Path) -> bool:
    """Remove a baseline unless another evaluation uses it; whether it did."""
    descriptor = _lock(path, shared=False)
    if descriptor is None:
        return False
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
    return True


def _is_whole(path: Path) -> bool:
    if not path.is_dir():
        return False
    try:
        open_bundle(path)
        os.utime(path)
    except (GapExportError, OSError) as err:
        logger.info("baseline %s is made anew: %s", path, err)
        return False
    return True


def _key(recipe: Recipe, source: SourceSpec, options: ExportOptions) -> str:
    files = [(part.role, file.path, file.sha256) for part in source.parts for file in part.files]
    parts = {
        "code": _code_digest(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "recipe": recipe.model_dump(mode="json"),
        "files": sorted(files),
        "random_seed": source.random_seed,
        "options": {
            each.name: repr(getattr(options, each.name))
            for each in fields(options)
            if each.name not in _ELSEWHERE
        },
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _code_digest() -> str:
    """Of this package's own code, which a version does not tell while it is worked on."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root)} {len(content)} ".encode())
        found.update(content)
    return found.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _own_bytes(folder: Path) -> int:
    """Bytes that removing a folder gives back: files that no other folder holds."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
