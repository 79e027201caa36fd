"""What is different about a weight is said, wherever its bytes lie."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from gap_export.errors import BundleError
from gap_export.parity.inside.stored_weights import compare_weight

TRUTH = torch.arange(6, dtype=torch.float32).reshape(2, 3) + 1


def inline(values):
    proto = onnx.numpy_helper.from_array(np.asarray(values), "w")
    return memoryview(proto.SerializeToString())


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (TRUTH.numpy(), ""),
        (TRUTH.numpy().T.copy(), "it is transposed"),
        (TRUTH.numpy().reshape(6), "shape [6] instead of [2, 3]"),
        (np.zeros((2, 3), np.float32), "all of it is zero"),
        (TRUTH.numpy() + np.eye(2, 3, dtype=np.float32), "2 of 6 values differ, by up to 1"),
        (TRUTH.numpy().astype(np.float16), "float16 instead of float32"),
        (np.full((2, 3), np.nan, np.float32), "6 of 6 values differ, by up to inf"),
    ],
    ids=["same", "transposed", "shape", "zero", "some", "dtype", "nan"],
)
def test_a_difference_is_named(held, said, tmp_path):
    assert compare_weight(inline(held), TRUTH, folder=tmp_path) == said


def test_bytes_of_another_file_are_read_where_they_lie(tmp_path):
    proto = onnx.TensorProto(data_type=onnx.TensorProto.BFLOAT16, dims=[2, 3], name="w")
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "4"), ("length", "12")):
        proto.external_data.add(key=key, value=value)
    raw = memoryview(proto.SerializeToString())
    half = TRUTH.to(torch.bfloat16)
    content = b"skip" + half.view(torch.int16).numpy().tobytes()
    (tmp_path / "weights.bin").write_bytes(content)
    assert compare_weight(raw, half, folder=tmp_path) == ""
    (tmp_path / "weights.bin").write_bytes(content[:-1])
    with pytest.raises(BundleError, match="lies outside of its file"):
        compare_weight(raw, half, folder=tmp_path)
