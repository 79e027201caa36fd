from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gap_export.checkpoint.weights import files as files_module
from gap_export.checkpoint.weights import index_checkpoint, read_header, read_json_object
from gap_export.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(
    path: Path, header: object, data: bytes = b"\0" * 8, *, length: int | None = None
) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_references_point_at_the_bytes(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "long": torch.tensor([-1, 2**40]),
        "half": torch.tensor([0.5], dtype=torch.float16),
        "brain": torch.tensor([[1.5, -3e38]], dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int32),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros((0, 4)),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    refs = read_header(tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    assert set(refs) == set(tensors)
    for key, tensor in tensors.items():
        ref = refs[key]
        assert raw[ref.offset : ref.offset + ref.length] == raw_bytes(tensor)
        loaded = ref.load()
        assert loaded.dtype == tensor.dtype
        assert loaded.shape == tensor.shape
        assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("pad", range(9))
def test_bytes_at_any_offset_are_read_right(tmp_path, pad):
    values = torch.tensor([1.0, -2.5, 3e38])
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    header = json.dumps({"a": entry}).encode() + b" " * pad
    path = write(tmp_path / "w.safetensors", header, raw_bytes(values))
    loaded = read_header(path)["a"].load()
    assert torch.equal(loaded, values)
    assert loaded.data_ptr() % 4 == 0


def test_writing_to_a_loaded_tensor_changes_no_file(tmp_path):
    save_file({"a": torch.ones(4096)}, tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    ref = read_header(tmp_path / "w.safetensors")["a"]
    ref.load().zero_()
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert torch.equal(ref.load(), torch.ones(4096))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs a Linux /proc")
def test_loading_takes_no_memory_until_it_is_touched(tmp_path):
    size = 1 << 33
    entry = {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"a": entry}).encode()
    path = write(tmp_path / "w.safetensors", header + b" " * (-len(header) % 8), b"")
    with path.open("ab") as stream:
        stream.truncate(stream.tell() + size)
    before = resident_bytes()
    loaded = read_header(path)["a"].load()
    loaded[-1] = 3
    assert loaded[-2:].tolist() == [0, 3]
    assert resident_bytes() - before < 1 << 24


ENTRY, OFFSET = "entry 'a'", "invalid offset for tensor"
DAMAGED = [
    (b"{not json", b"", "invalid JSON"),
    (b"\xff\xfe", b"", "invalid UTF-8"),
    (b"[" * 100_000, b"", "invalid type: sequence"),
    ([1], b"", "invalid type: sequence"),
    ({"a": 3}, b"", "invalid type: integer `3`"),
    ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "missing field `data_offsets`"),
    ({"a": {**F32, "extra": 1}}, b"\0" * 8, ENTRY),
    ({"a": {**F32, "shape": [1] * 17 + [2]}}, b"\0" * 8, ENTRY),
    ({"a": {**F32, "shape": [1] * 10**6 + [2]}}, b"\0" * 8, ENTRY),
    ({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}, b"", ENTRY),
    ({"a": {**F32, "shape": [int("9" * 4000)] * 3000}}, b"\0" * 8, "number out of range"),
    ({"a": {**F32, "dtype": "F31"}}, b"\0" * 8, "unknown variant `F31`"),
    ({"a": {**F32, "shape": [-2]}}, b"\0" * 8, "integer `-2`"),
    ({"a": {**F32, "shape": [2.0]}}, b"\0" * 8, "floating point `2.0`"),
    ({"a": {**F32, "shape": [3]}}, b"\0" * 8, "invalid shape"),
    ({"a": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8, "invalid offset for tensor `a`"),
    ({"a": {**F32, "data_offsets": [0, 8, 9]}}, b"\0" * 8, "invalid JSON"),
    ({"a": F32}, b"\0" * 7, "file not fully covered"),
    ({"a": F32}, b"\0" * 9, "file not fully covered"),
    ({"a": F32, "b": F32}, b"\0" * 8, OFFSET),
    ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12, OFFSET),
    ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, b"\0" * 20, OFFSET),
    ({"a": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12, "invalid offset for tensor `a`"),
    (b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 8, "a"),
    ({"a" * 10**6: F32}, b"\0" * 8, "a name of 1000000 characters"),
]


@pytest.mark.parametrize(("header", "data", "says"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_header_is_refused_at_once_and_shown_in_short(tmp_path, header, data, says):
    path = write(tmp_path / "w.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_header_length_that_lies_is_refused(tmp_path, length):
    path = write(tmp_path / "w.safetensors", {"a": F32}, length=length)
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 3, 7, 20, -1])
def test_truncated_file_is_refused(tmp_path, size):
    save_file({"a": torch.zeros(100)}, tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(raw[:size])
    with pytest.raises(CheckpointError, match="header too small" if 0 <= size < 8 else "damaged"):
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
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refs = index_checkpoint(tmp_path)
    assert {k: r.file.name for k, r in refs.items()} == index["weight_map"]

    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="in two weight files"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../one.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "..safetensors/../x.safetensors"}},
        {"weight_map": {"a": "pytorch_model.bin"}},
        {"weight_map": {}},
        # No file system has such names.
        *({"weight_map": {"a": f"{name}.safetensors"}} for name in ("a" * 300, "\u00e9" * 200)),
        {"weight_map": {"a": "\ud800" * 100 + ".safetensors"}},
    ],
)
def test_index_that_names_no_plain_files_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="damaged"):
        index_checkpoint(tmp_path)


def test_reading_a_dtype_without_a_meaning_here_is_refused(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}
    ref = read_header(write(tmp_path / "w.safetensors", header))["a"]
    with pytest.raises(CheckpointError, match=r"F8_E4M3.*allowed: BF16"):
        ref.load()


def test_reading_a_file_that_shrank_or_went_away_is_refused(tmp_path):
    path = write(tmp_path / "w.safetensors", {"a": F32})
    ref = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"a ends at byte (\d+) of \d+"):
        ref.load()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ref.load()


def test_git_lfs_pointer_is_named_as_such(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4988025760\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize("absent", [["b.safetensors"], ["a.safetensors", "b.safetensors"]])
def test_missing_shards_are_one_clear_error(tmp_path, absent):
    names = ["a.safetensors", "b.safetensors", "c.safetensors"]
    for number, name in enumerate(names):
        if name not in absent:
            save_file({f"t{number}": torch.ones(1)}, tmp_path / name)
    index = {"weight_map": {f"t{n}": name for n, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        index_checkpoint(tmp_path)
    assert f"{len(absent)} of the checkpoint's 3 weight files" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert ", ".join(absent) in str(caught.value)


def test_json_of_absurd_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_MAX_JSON_BYTES", 100)
    (tmp_path / "config.json").write_text("{%s}" % (" " * 98))
    assert read_json_object(tmp_path / "config.json") == {}
    (tmp_path / "config.json").write_text("{%s}" % (" " * 99))
    with pytest.raises(CheckpointError, match="more than 100 bytes"):
        read_json_object(tmp_path / "config.json")


def test_json_object_is_read_or_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1}')
    assert read_json_object(tmp_path / "a.json") == {"x": 1}
    with pytest.raises(CheckpointError, match="not found"):
        read_json_object(tmp_path / "b.json")
