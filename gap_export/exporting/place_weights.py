"""Weights into the bundle: the user's files by reference where they serve as they are.

A tensor whose bytes lie plain in a file (safetensors, or a PyTorch zip, which is never unpickled
again) in the dtype of the export is never read: its whole file is held in the bundle (a clone, a
hard link, or a copy), and graphs point into it. What has to be computed or cast (merged, split,
of another dtype) is streamed into one file of our own, tensor by tensor.

What is quantized is in the bundle as integers alone: a file that holds it as floats is not brought
in, and what else is needed of such a file is streamed, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from gap_export.bundle import BundleDraft
from gap_export.checkpoint.weights import (
    QUANTIZED_NAME,
    SAFETENSORS_NAMES,
    TORCH_DTYPES,
    DerivedWeight,
    Int8Place,
    PlacedTensor,
    QuantizedPlace,
    TensorRef,
    Weight,
    check_blocks,
    place_reference,
    quantized_bytes,
    store_quantized,
    store_weights,
)
from gap_export.exporting.quantization import linear_keys
from gap_export.families import Reference
from gap_export.progress import Progress
from gap_export.spec.manifest import QuantizationSpec

NEWLINE = "image_newline"
_DECODER = "decoder_model_merged"
_CONVERTED = "converted"
# Where a weight is said to lie that the bundle has as integers alone. No file is called that: a
# graph that was not quantized after all cannot be opened.
NOT_HELD = "not-held-as-floats"

# By component and key.
QuantizedPlaces = Mapping[str, Mapping[str, QuantizedPlace | Int8Place]]
_NONE: QuantizedPlaces = MappingProxyType({})


class PlacedWeights:
    """Where the bundle holds each weight of a reference.

    Attributes:
        dtype: Of the weights, float32, float16 or bfloat16.
        files: The user's files that the bundle holds, with their names in it.
    """

    def __init__(
        self,
        places: Mapping[int, PlacedTensor],
        weights: Iterable[Weight],
        *,
        dtype: str,
        files: Mapping[Path, str],
        quantized: QuantizedPlaces,
    ) -> None:
        self.dtype = dtype
        self.files = files
        self._places = places
        self._quantized = quantized
        # The places go by identity, which holds only as long as the weights live.
        self._weights = tuple(weights)

    def of(self, refs: Mapping[str, Weight]) -> dict[str, PlacedTensor]:
        """The places of some weights, by the same keys; :data:`NOT_HELD` of those of integers."""
        dtype = SAFETENSORS_NAMES[self.dtype]
        item_bytes = TORCH_DTYPES[dtype].itemsize
        return {
            key: self._places.get(id(weight))
            or PlacedTensor(
                location=NOT_HELD,
                dtype=dtype,
                shape=weight.shape,
                offset=0,
                length=math.prod(weight.shape) * item_bytes,
            )
            for key, weight in refs.items()
        }

    def quantized(self, component: str) -> Mapping[str, QuantizedPlace | Int8Place]:
        """What a component's graph reads as integers, by the key of its weight."""
        return self._quantized.get(component, {})

    @property
    def all_quantized(self) -> QuantizedPlaces:
        """What the bundle holds as integers, by component and key of its weight."""
        return self._quantized


def check_quantization(reference: Reference, spec: QuantizationSpec) -> None:
    """See, before anything is written, that a model can be quantized so.

    Raises:
        UsageError: the block size does not divide the input width of a layer, or is not offered.
        CheckpointError: a layer's weight is no float matrix.
    """
    check_blocks(_linear_weights(reference, spec), block_size=spec.block_size)


def quantize_weights(
    draft: BundleDraft,
    reference: Reference,
    spec: QuantizationSpec,
    *,
    dtypes: Collection[str],
    progress: Progress,
) -> QuantizedPlaces:
    """Write the decoder's linear layers into the bundle as INT4, once for graphs of all dtypes.

    They are quantized from the checkpoint's own values, for a reference of any dtype.

    Args:
        draft: The bundle.
        reference: Any of the export's, on the meta device.
        spec: How; its method is a matter of the reference's weights, see ``scale_channels``.
        dtypes: float32, float16, bfloat16: of the graphs that will read them.
        progress: Progress reporter, in bytes written.

    Raises:
        UsageError: the block size does not divide the input width of a layer, or is not offered.
        CheckpointError: a weight cannot be read, or is not finite.
        OutputError: the disk is full or cannot be written.
    """
    weights = _linear_weights(reference, spec)
    names = [SAFETENSORS_NAMES[dtype] for dtype in dtypes]
    path = draft.folder / QUANTIZED_NAME
    check_blocks(weights, block_size=spec.block_size)
    total = quantized_bytes(weights, block_size=spec.block_size, dtypes=names)
    with progress.stage("quantizing weights", total=total) as step:
        places = store_quantized(
            path, weights, block_size=spec.block_size, dtypes=names, advance=step
        )
    draft.hasher.start(path)
    start = len(f"{_DECODER}.")
    return {_DECODER: {name[start:]: place for name, place in places.items()}}


def place_weights(
    draft: BundleDraft,
    reference: Reference,
    *,
    hold: Literal["link", "copy"],
    progress: Progress,
    quantized: QuantizedPlaces = _NONE,
    beside: PlacedWeights | None = None,
) -> PlacedWeights:
    """Put all that a reference's graphs need into the bundle.

    Args:
        draft: The bundle.
        reference: On the meta device.
        hold: How files that serve as they are get there.
        progress: Progress reporter, in bytes converted.
        quantized: From :func:`quantize_weights` and ``store_tower``; not placed as floats.
        beside: What the bundle holds of another reference of the same model, e.g. of another dtype.

    Raises:
        CheckpointError: a weight cannot be read, or does not fit the dtype.
        OutputError: the disk is full or cannot be written.
    """
    dtype = SAFETENSORS_NAMES[reference.dtype]
    weights = _named_weights(reference, quantized)
    held = dict(beside.files) if beside is not None else {}
    barred = _files_with(reference, quantized) - held.keys()
    as_is = {
        name: weight
        for name, weight in weights.items()
        if isinstance(weight, TensorRef) and weight.dtype == dtype and weight.file not in barred
    }
    new = {ref.file for ref in as_is.values()} - held.keys()
    for file, name in _bundle_names(new, taken=_names_in(draft.folder)).items():
        draft.place(file, name, hold=hold)
        held[file] = name
    places = {name: place_reference(ref, held[ref.file]) for name, ref in as_is.items()}
    rest = {name: weight for name, weight in weights.items() if name not in as_is}
    if rest:
        stem = _CONVERTED if beside is None else f"{_CONVERTED}-{reference.dtype}"
        places |= _convert(draft, rest, dtype, stem=stem, progress=progress)
    return PlacedWeights(
        {id(weights[name]): places[name] for name in weights},
        weights.values(),
        dtype=reference.dtype,
        files=held,
        quantized=quantized,
    )


def _convert(
    draft: BundleDraft,
    weights: Mapping[str, Weight],
    dtype: str,
    *,
    stem: str,
    progress: Progress,
) -> dict[str, PlacedTensor]:
    name, taken = f"{stem}.safetensors", _names_in(draft.folder)
    while name in taken:
        name = f"gap-{name}"
    item_bytes = TORCH_DTYPES[dtype].itemsize
    total = sum(math.prod(weight.shape) for weight in weights.values()) * item_bytes
    path = draft.folder / name
    with progress.stage("converting weights", total=total) as step:
        places = store_weights(path, weights, dtype=dtype, advance=step)
    # Hashed while the graphs are traced.
    draft.hasher.start(path)
    return places


def _linear_weights(reference: Reference, spec: QuantizationSpec) -> dict[str, Weight]:
    """What is quantized, by a name that tells where it is used."""
    component = reference.component(_DECODER)
    return {
        f"{_DECODER}.{key}": component.weight_refs[key]
        for key in linear_keys(component, lm_head=spec.lm_head)
    }


def _files_with(reference: Reference, quantized: QuantizedPlaces) -> set[Path]:
    """The user's files that hold what is quantized, or what it is computed from, as floats."""
    found: set[Path] = set()
    weights = [
        component.weight_refs[key]
        for component in reference.components
        for key in quantized.get(component.name, ())
    ]
    while weights:
        weight = weights.pop()
        if isinstance(weight, TensorRef):
            found.add(weight.file)
        elif isinstance(weight, DerivedWeight):
            weights += weight.sources
    return found


def _named_weights(reference: Reference, quantized: QuantizedPlaces) -> dict[str, Weight]:
    """Every weight that is read as floats, once, by a name that tells where it is used first."""
    named: dict[str, Weight] = {}
    seen: set[int] = set()
    for component in reference.components:
        instead = quantized.get(component.name, {})
        for key, weight in component.weight_refs.items():
            if key not in instead and id(weight) not in seen:
                seen.add(id(weight))
                named[f"{component.name}.{key}"] = weight
    if reference.newline_weight is not None and id(reference.newline_weight) not in seen:
        named[NEWLINE] = reference.newline_weight
    return named


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _bundle_names(files: Iterable[Path], *, taken: Collection[str]) -> dict[Path, str]:
    """A name for each weight file; the folder is joined on where two are called the same."""
    names: dict[Path, str] = {}
    for file in sorted(files, key=lambda f: (len(f.parts), f)):
        name, parent = file.name, file.parent
        while name in names.values() or name in taken:
            name, parent = f"{parent.name}-{name}", parent.parent
        names[file] = name
    return names
