"""What a bundle says of its model beside graphs, held against recipe and checkpoint.

The reference takes nothing of this from the bundle: what is wrong there would else be wrong on both
sides alike. Grid, prompt and box are the recipe's, and were compared when it was found; so was the
image, but for how the checkpoint's own code cuts tiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gap_export.bundle import Bundle
from gap_export.families import Reference
from gap_export.spec.manifest import MANIFEST_NAME, ImageSpec, differing_fields


def write_assets(reference: Reference, folder: Path) -> None:
    """Write a reference's own tokenizers into a folder, under the names that a bundle has them."""
    for name, asset in reference.assets.items():
        (folder / name).write_bytes(_content(asset))


def find_other_facts(bundle: Bundle, reference: Reference, image: ImageSpec) -> Iterator[str]:
    """What a bundle says that its checkpoint does not, a sentence each."""
    manifest = bundle.manifest
    tower = reference.text_encoder_spec
    if tower is not None and manifest.text_encoder is not None and not manifest.prompt.question:
        # Made before there were segments of long texts, as before there was a question.
        tower = replace(tower, long_texts=manifest.text_encoder.long_texts)
    for name, held, right in (
        ("decoder", manifest.decoder, reference.decoder_spec),
        ("image", manifest.image, image),
        ("text_encoder", manifest.text_encoder, tower),
    ):
        for path, seen, allowed in differing_fields(held, right):
            yield (
                f"{MANIFEST_NAME} says {name}{path} is {seen!r}, and recipe and checkpoint give "
                f"{allowed!r}"
            )
    for name, asset in reference.assets.items():
        file = bundle.file(name)
        here, wanted = file.read_bytes() if file.is_file() else b"", _content(asset)
        if here != wanted and _parsed(here) != _parsed(wanted):
            yield f"{name} is not the tokenizer that recipe and checkpoint give"


def _content(asset: Path | bytes) -> bytes:
    return asset if isinstance(asset, bytes) else asset.read_bytes()


def _parsed(raw: bytes) -> object:
    """JSON as data: how it is written is no matter."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw
