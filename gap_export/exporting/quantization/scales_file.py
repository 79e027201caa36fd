"""The file in a bundle that says what AWQ has scaled its decoder's channels by.

With it and the checkpoint everybody can round the weights once more, and compare. It holds for each
linear layer that was looked at, by ``<component>.<layer>.input_scale``, s as float32 [K]: the
layer's weights were multiplied by it, along the input, before they were rounded; ones where nothing
was gained by that. Layers that read one input have the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from gap_export.checkpoint.weights import (
    DerivedWeight,
    TensorRef,
    read_header,
    store_weights,
)
from gap_export.errors import BundleError
from gap_export.exporting.quantization.awq import ChannelScale, channel_groups
from gap_export.families import Component
from gap_export.families.common.decoder_kind import ChannelGroup

SCALES_NAME = "awq.safetensors"
_DTYPE = "F32"


def store_scales(path: Path, scales: Iterable[ChannelScale], *, of: str) -> None:
    """Write scales into a safetensors file.

    Args:
        path: The new file; it is removed again where writing it fails.
        scales: From :func:`gap_export.exporting.quantization.find_scales`.
        of: Name of the component they belong to.

    Raises:
        OSError: the file is there already or cannot be written, or the disk has no room for it.
    """
    # One object a layer: what shares an object, a file knows by one name alone.
    weights = {
        _name(of, reader): DerivedWeight(
            dtype=_DTYPE,
            shape=tuple(found.scale.shape),
            sources=(),
            compute=partial(torch.clone, found.scale),
            origin="calibration",
        )
        for found in scales
        for reader in found.group.readers
    }
    store_weights(path, weights, dtype=_DTYPE)


def read_scales(path: Path, component: Component) -> tuple[ChannelScale, ...]:
    """Read what :func:`store_scales` wrote, in the order of ``find_scales``.

    Args:
        path: The file.
        component: The decoder they belong to; of its weights only the shapes are looked at.

    Raises:
        BundleError: the file is not there, does not belong to such a decoder, or holds what scales
            cannot be.
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        raise BundleError(
            "the bundle does not say what its decoder's channels were scaled by",
            seen=f"no {path.name}",
            fix="export the bundle again with this version",
        )
    refs = read_header(path)
    groups = channel_groups(component)
    wanted = {_name(component.name, reader) for group in groups for reader in group.readers}
    if refs.keys() != wanted:
        missing, unknown = sorted(wanted - refs.keys()), sorted(refs.keys() - wanted)
        raise BundleError(
            f"{path.name} does not belong to this decoder",
            seen=f"missing {', '.join(missing[:3]) or 'none'}; unknown "
            f"{', '.join(unknown[:3]) or 'none'}",
            allowed=f"scales of its {len(wanted)} linear layers",
            fix="export the bundle again",
        )
    return tuple(
        ChannelScale(group=group, scale=_read(path, refs, group, component)) for group in groups
    )


def _read(
    path: Path, refs: dict[str, TensorRef], group: ChannelGroup, component: Component
) -> torch.Tensor:
    """The scale of a group, float32 [K].

    Raises:
        BundleError: it is of another shape or dtype, not finite, not above 0, or not the same for
            all readers.
    """
    shape = component.weight_refs[f"{group.readers[0]}.weight"].shape[1:]
    found: list[torch.Tensor] = []
    for reader in group.readers:
        ref = refs[_name(component.name, reader)]
        if (ref.dtype, ref.shape) != (_DTYPE, shape):
            raise _refuse(path, ref, f"{ref.dtype} {list(ref.shape)}", f"{_DTYPE} {list(shape)}")
        scale = ref.load()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise _refuse(path, ref, f"{float(scale.min())}", "finite numbers above 0")
        if found and not torch.equal(scale, found[0]):
            raise _refuse(path, ref, "other numbers", f"those of {group.readers[0]}")
        found.append(scale)
    return found[0]


def _refuse(path: Path, ref: TensorRef, seen: str, allowed: str) -> BundleError:
    return BundleError(
        f"{path.name}: {ref.key} cannot be a scale of channels",
        seen=seen,
        allowed=allowed,
        fix="export the bundle again",
    )


def _name(component: str, layer: str) -> str:
    return f"{component}.{layer}.input_scale"
