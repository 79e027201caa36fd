from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gap_export.errors import CheckpointError
from gap_export.weights import index_checkpoint, read_header, read_json_object, read_tensor

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(
    path: Path, header: object, data: bytes = b"\0" * 8, *, length: int | None = None
) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_references_point_at_the_bytes(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([-1, 2**40], dtype=np.int64),
        "half": np.array([0.5], dtype=np.float16),
        "none": np.zeros((0, 4), dtype=np.float32),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "np"})
    refs = read_header(tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    assert set(refs) == set(tensors)
    for key, tensor in tensors.items():
        ref = refs[key]
        assert raw[ref.offset : ref.offset + ref.length] == tensor.tobytes()
        assert np.array_equal(read_tensor(ref), tensor)
        assert read_tensor(ref).dtype == tensor.dtype


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{not json", b"", "JSON does not parse"),
        (b"\xff\xfe", b"", "JSON does not parse"),
        (b"[" * 100_000, b"", "JSON does not parse"),
        ([1], b"", "a JSON list"),
        ({"a": 3}, b"", "entry 'a' is 3"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "entry 'a'"),
        ({"a": {**F32, "extra": 1}}, b"\0" * 8, "entry 'a'"),
        ({"a": {**F32, "dtype": "F31"}}, b"\0" * 8, "dtype 'F31'"),
        ({"a": {**F32, "shape": [-2]}}, b"\0" * 8, "shape"),
        ({"a": {**F32, "shape": [2.0]}}, b"\0" * 8, "shape"),
        ({"a": {**F32, "shape": [3]}}, b"\0" * 8, "8 bytes for F32"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8, "-8 bytes"),
        ({"a": {**F32, "data_offsets": [0, 8, 9]}}, b"\0" * 8, "at"),
        ({"a": F32}, b"\0" * 7, "tensors end at byte"),
        ({"a": F32}, b"\0" * 9, "tensors end at byte"),
        ({"a": F32, "b": F32}, b"\0" * 8, "b overlaps"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12, "b overlaps"),
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, b"\0" * 20, "b follows a hole"),
        ({"a": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12, "a follows a hole"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 8, "occurs twice"),
    ],
)
def test_damaged_header_is_refused(tmp_path, header, data, says):
    path = write(tmp_path / "w.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_header_length_that_lies_is_refused(tmp_path, length):
    path = write(tmp_path / "w.safetensors", {"a": F32}, length=length)
    with pytest.raises(CheckpointError, match="header of"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 3, 7])
def test_file_shorter_than_its_length_field_is_refused(tmp_path, size):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match=f"{size} bytes in all"):
        read_header(path)


def test_truncated_file_is_refused(tmp_path):
    save_file({"a": np.zeros(100, dtype=np.float32)}, tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    for size in (4, 20, len(raw) - 1):
        (tmp_path / "w.safetensors").write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "w.safetensors")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_missing_folder_and_folder_without_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="folder not found"):
        index_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no weights"):
        index_checkpoint(tmp_path)


def test_sharded_checkpoint_is_read_through_its_index(tmp_path):
    save_file({"a": np.ones(2, dtype=np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(3, dtype=np.float32)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refs = index_checkpoint(tmp_path)
    assert {k: r.file.name for k, r in refs.items()} == index["weight_map"]

    save_file({"a": np.ones(2, dtype=np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="in two weight files"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../one.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
    ],
)
def test_index_that_names_no_plain_files_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="damaged"):
        index_checkpoint(tmp_path)


def test_reading_what_numpy_does_not_know_is_refused(tmp_path):
    header = {"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    ref = read_header(write(tmp_path / "w.safetensors", header))["a"]
    with pytest.raises(CheckpointError, match="BF16"):
        read_tensor(ref)


def test_reading_a_file_that_shrank_is_refused(tmp_path):
    path = write(tmp_path / "w.safetensors", {"a": F32})
    ref = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends after 1 of 2"):
        read_tensor(ref)


def test_json_object_is_read_or_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1}')
    assert read_json_object(tmp_path / "a.json") == {"x": 1}
    with pytest.raises(CheckpointError, match="not found"):
        read_json_object(tmp_path / "b.json")
