"""Tensors of a bundle by offset, with numpy alone."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.bundle.tensors import read_place
from gap_export.errors import BundleError
from gap_export.spec.manifest import TensorPlace


def place(**changes: object) -> TensorPlace:
    plain = {"file": "w.safetensors", "offset": 3, "dtype": "float32", "shape": (2, 3)}
    return TensorPlace(**{**plain, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(2, 3), (6,), (), (0, 4)])
def test_values_are_read_at_any_offset(tmp_path, dtype, shape):
    values = np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape) - 2
    (tmp_path / "w.safetensors").write_bytes(b"abc" + values.tobytes() + b"more")
    read = read_place(tmp_path, place(dtype=dtype, shape=shape))
    assert read.dtype == dtype
    assert read.shape == shape
    assert np.array_equal(read, values)


def test_bfloat16_becomes_float32(tmp_path):
    values = np.array([1.5, -0.0, 3e38, np.inf, 1e-40], dtype=np.float32)
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    (tmp_path / "w.safetensors").write_bytes(b"abc" + upper.tobytes())
    read = read_place(tmp_path, place(dtype="bfloat16", shape=(5,)))
    expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert read.dtype == np.float32
    assert np.array_equal(read.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    "changes",
    [{"offset": 4}, {"shape": (2, 4)}, {"offset": -1}, {"shape": (-1, -6)}, {"offset": 1 << 70},
     {"shape": (1 << 40, 1 << 40)}, {"shape": (0, -1)}],
)  # fmt: skip
def test_place_outside_of_the_file_is_refused(tmp_path, changes):
    (tmp_path / "w.safetensors").write_bytes(bytes(27))
    assert read_place(tmp_path, place()).shape == (2, 3)
    with pytest.raises(BundleError, match="lies outside of its file"):
        read_place(tmp_path, place(**changes))


def test_other_dtypes_files_and_folders_are_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(bytes(99))
    with pytest.raises(BundleError, match="dtype that is not read: int8"):
        read_place(tmp_path, place(dtype="int8"))
    with pytest.raises(BundleError, match="leaves its"):
        read_place(tmp_path / "sub", place(file="../w.safetensors"))
    with pytest.raises(BundleError, match="cannot be read"):
        read_place(tmp_path, place(file="none"))
