#!/usr/bin/env python3
"""What a container does when it starts: a key, engines for this GPU where there are any, a server.

    start.py [OPTIONS OF gap-export serve]      GAP_EXPORT_BUNDLE, by default /bundle, is served

Engines are built once from the bundle, for the GPU and the TensorRT at hand: into the bundle where
that can be written to, otherwise into a copy of it in the cache, a volume. The next start finds
them there. Where there is no GPU or no TensorRT, ONNX Runtime serves; GAP_EXPORT_BACKEND=trt makes
that an error, and =ort builds nothing.

The server listens to other machines, so it asks for a key: those of the file GAP_EXPORT_KEYS, or
one that is made up at the first start, in the cache's ``keys.txt``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from gap_export.bundle import Bundle, open_bundle
from gap_export.engines.build import build_engines
from gap_export.engines.device import find_gpu
from gap_export.engines.folder import engine_folders
from gap_export.engines.library import target_for
from gap_export.errors import GapExportError, UsageError
from gap_export.runtime.backends.tensorrt_loading import choose_engines

BACKENDS = ("auto", "trt", "ort")
_CACHE, _BUNDLE = Path("/cache"), Path("/bundle")


def main(
    arguments: Sequence[str], environment: Mapping[str, str], cache: Path = _CACHE
) -> list[str]:
    """Prepare all, and give the command of the server.

    Args:
        arguments: Further ones of ``gap-export serve``.
        environment: Of this process.
        cache: A folder that outlives the container.

    Raises:
        GapExportError: the bundle cannot be opened, or engines are asked for and cannot be had.
    """
    backend = environment.get("GAP_EXPORT_BACKEND", "auto")
    if backend not in BACKENDS:
        raise UsageError(
            "GAP_EXPORT_BACKEND is none of the backends", seen=backend, allowed=", ".join(BACKENDS)
        )
    bundle = open_bundle(Path(environment.get("GAP_EXPORT_BUNDLE", _BUNDLE)))
    if backend != "ort":
        try:
            bundle = with_engines(bundle, cache)
            backend = "trt"
        except UsageError as err:
            # What is missing here: a GPU, a TensorRT, or the graphs for it in the bundle.
            if backend == "trt":
                raise
            say(f"ONNX Runtime serves: {err}")
            backend = "ort"
    keys = environment.get("GAP_EXPORT_KEYS") or str(own_key(cache))
    listen = ["--host", "0.0.0.0", "--port", environment.get("GAP_EXPORT_PORT", "8000")]
    server = [sys.executable, "-m", "gap_export", "serve", str(bundle.path)]
    return [*server, *listen, "--api-keys", keys, "--backend", backend, *arguments]


def with_engines(bundle: Bundle, cache: Path) -> Bundle:
    """The bundle, or a copy of it, with engines that run here.

    Raises:
        UsageError: there is no GPU or no TensorRT, or the bundle was not made for them.
        GapExportError: engines cannot be built.
    """
    gpu = find_gpu()
    if gpu is None:
        raise UsageError("no NVIDIA GPU with a driver (libcuda.so.1) at hand")
    if runs_here(bundle):
        return bundle
    target = target_for(gpu.compute_capability)
    if not os.access(bundle.path, os.W_OK):
        bundle = copy_in(cache, bundle)
        if runs_here(bundle):
            return bundle
    say(f"building engines of target {target.spec} into {bundle.path}, once: minutes")
    build_engines(bundle, target, warn=say)
    return bundle


def runs_here(bundle: Bundle) -> bool:
    """Whether the bundle has engines for this GPU and this TensorRT."""
    if not engine_folders(bundle):
        return False
    try:
        choose_engines(bundle)
    except UsageError as err:
        # Those of another card or version; damaged ones are built again as well.
        say(f"built before, and no use here: {err}")
        return False
    return True


def copy_in(cache: Path, bundle: Bundle) -> Bundle:
    """The bundle's copy in the cache, named by its manifest's hash; it is whole or not there."""
    digest = (bundle.path / "gap.json.sha256").read_text(encoding="ascii").split()[0]
    place = cache / "bundles" / digest[:16]
    if not place.is_dir():
        say(f"{bundle.path} is read-only: copying it to {place}")
        partial = place.with_name(place.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(bundle.path, partial, ignore=shutil.ignore_patterns("engines"))
        partial.rename(place)
    return open_bundle(place)


def own_key(cache: Path) -> Path:
    """A file with a key, made up once."""
    file = cache / "keys.txt"
    if not file.is_file():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(32) + "\n", encoding="ascii")
        say(f"made a key: see {file}")
    return file


def say(text: str) -> None:
    """One line to the container's log."""
    print(text, file=sys.stderr, flush=True)


def run() -> NoReturn:
    """Become the server, so that signals are its own."""
    try:
        command = main(sys.argv[1:], os.environ)
    except GapExportError as err:
        say(f"error: {err}")
        sys.exit(int(err.exit_code))
    os.execv(command[0], command)


if __name__ == "__main__":
    run()
