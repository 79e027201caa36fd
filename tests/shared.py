"""What takes long to make is made once in a run of the tests, for all of its workers."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gap_export.spec.manifest import GraphSpec
from gap_export.spec.requests import EnginesRequest, PruningRequest


class SharedFolder:
    """A folder of this run, which its workers share. What is in it is read only."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file or a folder, made by the first worker that asks for it.

        Another that asks meanwhile waits. What a failure left half made is made anew.
        """
        path, made = self.root / name, self.root / f"{name}.made"
        with (self.root / f"{name}.lock").open("w") as lock:
            # Given back when the file is closed, or its process ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                if path.is_dir():
                    shutil.rmtree(path)
                make(path)
                made.touch()
        return path


class SharedGraphs:
    """Serves as the ``GraphCache`` of one checkpoint, in files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder

    def get(self, key: tuple[object, ...]) -> tuple[bytes, GraphSpec] | None:
        path = self._path(key)
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def put(self, key: tuple[object, ...], file: bytes, spec: GraphSpec) -> None:
        path = self._path(key)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps((file, spec)))
        part.replace(path)

    def _path(self, key: tuple[object, ...]) -> Path:
        return self._folder / _short_hash(key)


class SharedExports:
    """Bundles, each exported once in a run."""

    def __init__(self, shared: SharedFolder) -> None:
        self._shared = shared

    def bundle(self, **options: Any) -> Path:
        """A bundle of these options, see :func:`sort_options`. Read only."""

        def export(out: Path) -> None:
            from gap_export.exporting import ExportOptions, export_model

            export = ExportOptions(**sort_options(options), out=out)
            export_model(export, cache=self.graphs(options["model"]))

        return self._shared.once(f"bundle-{_short_hash(sorted(options.items()))}", export)

    def graphs(self, model: str) -> SharedGraphs:
        """The cache for exports of a model whose graphs without pruning other tests look at."""
        return SharedGraphs(self._shared.root / f"graphs-{_short_hash(model)}")


def sort_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their own names, those of a request put into it."""
    found = dict(options)
    for name, request in (("pruning", PruningRequest), ("engines", EnginesRequest)):
        given = {f.name: found.pop(f.name) for f in fields(request) if f.name in found}
        if given:
            found[name] = request(**given)
    return found


def _short_hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
