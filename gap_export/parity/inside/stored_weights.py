"""Whether a weight that a graph reads is the one it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from gap_export.bundle.tensors import read_place
from gap_export.spec.manifest import TensorPlace

_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def compare_weight(initializer: memoryview, weight: torch.Tensor, *, folder: Path) -> str:
    """What is different about a stored weight, in words; empty where nothing is.

    Args:
        initializer: Its message in an ONNX file.
        weight: What it must be, to the bit.
        folder: The file's, where other files with its weights lie.

    Raises:
        BundleError: it lies outside of its file.
    """
    proto = onnx.TensorProto.FromString(bytes(initializer))
    dtype = _DTYPES.get(proto.data_type)
    wanted = str(weight.dtype).removeprefix("torch.")
    if dtype != wanted:
        return f"{dtype or proto.data_type} instead of {wanted}"
    held, truth = _read(proto, dtype, folder), weight.detach().float().numpy()
    if np.array_equal(held, truth):
        return ""
    if truth.ndim == 2 and np.array_equal(held, truth.T):
        return "it is transposed"
    if held.shape != truth.shape:
        return f"shape {list(held.shape)} instead of {list(truth.shape)}"
    if not held.any():
        return "all of it is zero"
    wrong = held != truth
    worst = float(np.nan_to_num(np.abs(held - truth), nan=np.inf).max())
    return f"{int(wrong.sum())} of {wrong.size} values differ, by up to {worst:.3g}"


def _read(proto: onnx.TensorProto, dtype: str, folder: Path) -> NDArray[np.float32]:
    places = {entry.key: entry.value for entry in proto.external_data}
    found: NDArray[Any]
    if places:
        # The onnx package refuses hard links, which is how a bundle may hold its weights.
        place = TensorPlace(
            file=places["location"],
            offset=int(places.get("offset", 0)),
            dtype=dtype,
            shape=tuple(proto.dims),
        )
        found = read_place(folder, place)
    else:
        found = onnx.numpy_helper.to_array(proto)
    return found.astype(np.float32)
