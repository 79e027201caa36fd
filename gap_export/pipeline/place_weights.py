"""Weights into the bundle: the user's files by reference where they serve as they are.

A tensor whose bytes lie plain in a file (safetensors, or a PyTorch zip, which is never unpickled
again) in the dtype of the export is never read: its whole file is held in the bundle (a clone, a
hard link, or a copy), and graphs point into it. Whatever has to be computed or cast (merged, split,
of another dtype) is streamed into one file of our own, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from gap_export.bundle import BundleDraft
from gap_export.families import Reference
from gap_export.progress import Progress
from gap_export.weights import (
    SAFETENSORS_NAMES,
    TORCH_DTYPES,
    PlacedTensor,
    TensorRef,
    Weight,
    place_reference,
    store_weights,
)

NEWLINE = "image_newline"
_CONVERTED = "converted.safetensors"


class PlacedWeights:
    """Where the bundle holds each weight of a reference."""

    def __init__(self, places: Mapping[int, PlacedTensor], weights: Iterable[Weight]) -> None:
        self._places = places
        # The places go by identity, which holds only as long as the weights live.
        self._weights = tuple(weights)

    def of(self, refs: Mapping[str, Weight]) -> dict[str, PlacedTensor]:
        """The places of some weights, by the same keys."""
        return {key: self._places[id(weight)] for key, weight in refs.items()}


def place_weights(
    draft: BundleDraft,
    reference: Reference,
    *,
    hold: Literal["link", "copy"],
    progress: Progress,
) -> PlacedWeights:
    """Put all that a reference's graphs need into the bundle.

    Args:
        draft: The bundle.
        reference: On the meta device.
        hold: How files that serve as they are get there.
        progress: Told the bytes that are converted.

    Raises:
        CheckpointError: a weight cannot be read, or does not fit the dtype.
        OutputError: the disk is full or cannot be written.
    """
    dtype = SAFETENSORS_NAMES[reference.dtype]
    weights = _named_weights(reference)
    as_is = {
        name: weight
        for name, weight in weights.items()
        if isinstance(weight, TensorRef) and weight.dtype == dtype
    }
    names = _bundle_names(sorted({ref.file for ref in as_is.values()}))
    for file, name in names.items():
        draft.place(file, name, hold=hold)
    places = {name: place_reference(ref, names[ref.file]) for name, ref in as_is.items()}
    rest = {name: weight for name, weight in weights.items() if name not in as_is}
    if rest:
        places |= _convert(draft, rest, dtype, taken=set(names.values()), progress=progress)
    return PlacedWeights({id(weights[name]): places[name] for name in weights}, weights.values())


def _convert(
    draft: BundleDraft,
    weights: Mapping[str, Weight],
    dtype: str,
    *,
    taken: set[str],
    progress: Progress,
) -> dict[str, PlacedTensor]:
    name = _CONVERTED if _CONVERTED not in taken else f"gap-{_CONVERTED}"
    item_bytes = TORCH_DTYPES[dtype].itemsize
    total = sum(math.prod(weight.shape) for weight in weights.values()) * item_bytes
    path = draft.folder / name
    with progress.stage("converting weights", total=total) as step:
        places = store_weights(path, weights, dtype=dtype, advance=step)
    # Hashed while the graphs are traced.
    draft.hasher.start(path)
    return places


def _named_weights(reference: Reference) -> dict[str, Weight]:
    """Every weight once, by a name that tells where it is used first."""
    named: dict[str, Weight] = {}
    seen: set[int] = set()
    for component in reference.components:
        for key, weight in component.weight_refs.items():
            if id(weight) not in seen:
                seen.add(id(weight))
                named[f"{component.name}.{key}"] = weight
    if reference.newline_weight is not None and id(reference.newline_weight) not in seen:
        named[NEWLINE] = reference.newline_weight
    return named


def _bundle_names(files: Iterable[Path]) -> dict[Path, str]:
    """A name for each weight file; the folder is joined on where two are called the same."""
    names: dict[Path, str] = {}
    for file in sorted(files, key=lambda f: len(f.parts)):
        name, parent = file.name, file.parent
        while name in names.values():
            name, parent = f"{parent.name}-{name}", parent.parent
        names[file] = name
    return names
