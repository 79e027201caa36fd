"""What takes long to make is made once in a run of the tests, for all of its workers."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

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


class SharedExports:
    """Bundles, each exported once in a run."""

    def __init__(self, shared: SharedFolder) -> None:
        self._shared = shared

    def bundle(self, **options: Any) -> Path:
        """A bundle of these options, see :func:`sort_options`. Read only."""

        def export(out: Path) -> None:
            from gap_export.exporting import ExportOptions, export_model
            from tests.shared_traces import share_traces

            share_traces(self._shared)
            export_model(ExportOptions(**sort_options(options), out=out))

        return self._shared.once(f"bundle-{_short_hash(sorted(options.items()))}", export)


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
