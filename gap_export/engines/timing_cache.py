"""What TensorRT measured on this GPU, kept for the next build.

A cache speaks for one version of TensorRT on one GPU generation, so each has a file of its own.
What is wrong with a cache costs time only; it is never an error.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from gap_export.bundle.stamps import cache_folder
from gap_export.engines.library import TensorRT

logger = logging.getLogger(__name__)

# Hex digits of the SHA-256 of what follows, which is TensorRT's own: it gets nothing damaged.
_HASH_BYTES = 64


def use_timing_cache(library: TensorRT, config: Any, compute_capability: int | None) -> None:
    """Give a builder's configuration what was measured before.

    Args:
        library: The TensorRT that builds.
        config: Its IBuilderConfig.
        compute_capability: The GPU's; None where it is not known: then nothing is kept.
    """
    path = _cache_file(library, compute_capability)
    if path is None:
        return
    cache = config.create_timing_cache(_read(path))
    if cache is None or not config.set_timing_cache(cache, False):
        logger.info("timing cache %s does not fit and is left out", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep_timing_cache(library: TensorRT, config: Any, compute_capability: int | None) -> None:
    """Keep what a build measured, as :func:`use_timing_cache` is to find it."""
    path = _cache_file(library, compute_capability)
    cache = None if path is None else config.get_timing_cache()
    if path is None or cache is None:
        return
    content = bytes(cache.serialize())
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
        part.replace(path)
    except OSError as err:
        logger.info("timing cache %s not written: %s", path, err)
        with suppress(OSError):
            part.unlink()


def _cache_file(library: TensorRT, compute_capability: int | None) -> Path | None:
    folder = cache_folder()
    if folder is None or compute_capability is None or library.is_rtx:
        return None
    name = f"{library.name}-{library.version}-sm{compute_capability}.cache"
    return folder / "timing" / name


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as err:
        logger.info("timing cache %s cannot be read: %s", path, err)
        return b""
    digest, content = raw[:_HASH_BYTES], raw[_HASH_BYTES:]
    if hashlib.sha256(content).hexdigest().encode() != digest:
        logger.info("timing cache %s is damaged and is left out", path)
        return b""
    return content
