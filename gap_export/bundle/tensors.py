"""Tensors that the runtime itself reads out of a bundle, with numpy alone."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import BundleError
from gap_export.spec.manifest import TensorPlace, check_member_path

# numpy knows no bfloat16, which is the upper half of a float32.
_STORED = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "uint8": "|u1",
}


def read_place(folder: Path, place: TensorPlace) -> NDArray[Any]:
    """Read a tensor.

    Args:
        folder: The bundle's.
        place: Where it lies.

    Returns:
        An array of ``place.shape`` and dtype; bfloat16 as float32.

    Raises:
        BundleError: the place is not within a file of the bundle, the dtype is another, or the file
            cannot be read.
    """
    if place.dtype not in _STORED:
        raise BundleError(
            "a tensor of the bundle has a dtype that is not read",
            seen=f"{place.dtype} in {place.file}",
            allowed=", ".join(_STORED),
        )
    stored = np.dtype(_STORED[place.dtype])
    path = folder / check_member_path(place.file)
    count = math.prod(place.shape)
    try:
        size = os.lstat(path).st_size
        end = place.offset + count * stored.itemsize
        if min(place.offset, *place.shape, 0) < 0 or end > size:
            raise BundleError(
                "a tensor of the bundle lies outside of its file",
                seen=f"bytes {place.offset} to {end} of {place.file}, which has {size}",
                fix="export the bundle again",
            )
        flat = np.fromfile(path, dtype=stored, count=count, offset=place.offset)
    except OSError as err:
        raise BundleError("the bundle cannot be read", seen=err) from err
    if flat.size != count:
        raise BundleError("a file of the bundle shrank while it was read", seen=path)
    if place.dtype == "bfloat16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    # Native byte order on any machine.
    return flat.astype(flat.dtype.newbyteorder("="), copy=False).reshape(place.shape)
