"""A process that decodes and prepares images, so that a decoder can be stopped from outside.

It reads questions from stdin and writes answers to stdout, each a head in JSON and a block of
bytes; nothing is pickled, since what it decodes is of strangers. It is run as
``python -m gap_export.serving.decode_process NAME=BUNDLE...``.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gap_export import errors
from gap_export.errors import GapExportError, ImageSizeError
from gap_export.runtime.image_view import PreparedImage
from gap_export.runtime.images.files import EncodedImage
from gap_export.runtime.images.geometry import ImageGeometry
from gap_export.runtime.images.image import read_image
from gap_export.spec.manifest import MANIFEST_NAME, Manifest, parse_manifest

# Lengths of the head and of the block behind it.
LENGTHS = struct.Struct("<IQ")
# What a decoder may have in all; images may take an eighth of it, see runtime.images.files.
_MAX_MEMORY = 4 << 30


def main() -> None:
    """Answer until stdin ends."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    folders = dict(word.split("=", 1) for word in sys.argv[1:])
    manifests = {
        name: parse_manifest((Path(folder) / MANIFEST_NAME).read_bytes())
        for name, folder in folders.items()
    }
    source, target = sys.stdin.buffer, sys.stdout.buffer
    # What a library prints must not get between the answers.
    sys.stdout = sys.stderr
    while (frame := _read(source)) is not None:
        head, data = frame
        try:
            answer = pack_prepared(_prepare(head, data, manifests[head.pop("model")]))
        except MemoryError:
            answer = _pack_error(ImageSizeError("the image takes too much memory to decode"))
        except GapExportError as err:
            answer = _pack_error(err)
        for part in answer:
            target.write(part)
        target.flush()


def pack(head: Mapping[str, Any], data: bytes | memoryview) -> tuple[bytes, bytes | memoryview]:
    """A message: what is written before the block, and the block."""
    text = json.dumps(head).encode()
    return LENGTHS.pack(len(text), len(data)) + text, data


def pack_prepared(prepared: PreparedImage) -> tuple[bytes, bytes | memoryview]:
    """A prepared image as a message."""
    pixels, geometry = np.ascontiguousarray(prepared.pixel_values), prepared.geometry
    head = {
        "orientation": prepared.orientation,
        "warnings": prepared.warnings,
        "shape": pixels.shape,
        "size": (geometry.width, geometry.height),
        "canvas": geometry.canvas,
        "num_tiled_tokens": prepared.num_tiled_tokens,
    }
    return pack(head, pixels.data.cast("B"))


def unpack_prepared(head: Mapping[str, Any], data: bytes) -> PreparedImage:
    """The image of a message from :func:`pack_prepared`.

    Raises:
        GapExportError: the message says that it cannot be used.
    """
    if "error" in head:
        raise getattr(errors, head["error"])(**head["parts"])
    width, height = head["size"]
    return PreparedImage(
        orientation=head["orientation"],
        warnings=tuple(head["warnings"]),
        pixel_values=np.frombuffer(data, np.float32).reshape(head["shape"]),
        geometry=ImageGeometry(
            width=width, height=height, canvas=head["canvas"] and tuple(head["canvas"])
        ),
        num_tiled_tokens=head["num_tiled_tokens"],
    )


def _prepare(head: dict[str, Any], data: bytes, manifest: Manifest) -> PreparedImage:
    image = EncodedImage(data=data, name="the image")
    loaded = read_image(image, pad_color=manifest.image.pad_color, **head)
    return PreparedImage.of(loaded, manifest)


def _pack_error(err: GapExportError) -> tuple[bytes, bytes | memoryview]:
    seen = None if err.seen is None else str(err.seen)
    parts = {"what": err.what, "seen": seen, "allowed": err.allowed, "fix": err.fix}
    return pack({"error": type(err).__name__, "parts": parts}, b"")


def _read(source: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    lengths = source.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    num_head, num_data = LENGTHS.unpack(lengths)
    return json.loads(source.read(num_head)), source.read(num_data)


if __name__ == "__main__":
    main()
