"""Pickles: what is in them comes out; what they would do is not done."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gap_export.checkpoint.weights import PickledTensor, TensorRef, index_pickle, index_pickles
from gap_export.errors import CheckpointError

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(state: object, path: Path, *, zipped: bool = True) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> dict[str, torch.Tensor]:
    long = torch.arange(100.0)
    return {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([[1.5], [3e38]], dtype=torch.bfloat16),
        "transposed": torch.arange(12).half().reshape(3, 4).t(),
        "view": long[10:20],
        "strided": long[1::7],
        "expanded": torch.tensor([[2.0]]).expand(3, 4),
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }


@FORMATS
def test_tensors_come_out_as_they_went_in(tmp_path, zipped):
    state = collections.OrderedDict(tensors(), step=3, rate=0.5, nothing=None)
    found = index_pickle(save(state, tmp_path / "w.bin", zipped=zipped))
    expected = tensors()
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        loaded = found[key].load()
        assert found[key].shape == tuple(tensor.shape)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor.detach())
        assert loaded.is_contiguous()
        assert not loaded.requires_grad
        assert type(loaded) is torch.Tensor
    assert found["half"].dtype == "F16"
    assert found["half"].origin == f"half in {tmp_path / 'w.bin'}"


def test_plain_tensors_of_an_archive_are_references_to_its_bytes(tmp_path):
    file = save(tensors(), tmp_path / "w.bin")
    found = index_pickle(file)
    raw = file.read_bytes()
    plain = {key for key, weight in found.items() if isinstance(weight, TensorRef)}
    assert plain == set(tensors()) - {"transposed", "strided", "expanded"}
    for key in plain:
        ref = found[key]
        values = tensors()[key].detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[ref.offset : ref.offset + ref.length] == values


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs a Linux /proc")
def test_indexing_reads_no_tensor(tmp_path):
    # Sparse on the disk: reading all of it fills the memory.
    size = 1 << 33
    with torch.serialization.skip_data():
        file = save({"big": torch.empty(size, dtype=torch.uint8)}, tmp_path / "w.bin")
    before = resident_bytes()
    loaded = index_pickle(file)["big"].load()
    assert loaded.shape == (size,)
    assert loaded[-1] == 0
    assert resident_bytes() - before < 1 << 26


def test_entry_is_taken_where_it_is_there(tmp_path):
    inside = {"model": {"a": torch.ones(2)}, "optimizer": {"b": torch.ones(1)}, "config": "text"}
    (weight,) = index_pickle(save(inside, tmp_path / "in.pth"), entry="model").values()
    assert torch.equal(weight.load(), torch.ones(2))
    assert set(index_pickle(save({"a": torch.ones(2)}, tmp_path / "top.pth"), entry="model")) == {
        "a"
    }


@FORMATS
@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"model": {"a": torch.ones(1)}}, r"something else than tensors: model in .*: dict"),
        ({"a": torch.ones(1), "text": "hello"}, "text in .*: str"),
        ({"a": [torch.ones(1)]}, "a in .*: list"),
        ({1: torch.ones(1)}, "no state dict: .*a key 1"),
        ([torch.ones(1)], "no state dict: .*list"),
        (torch.ones(1), "no state dict: .*Tensor"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "of a kind that cannot be read: .*complex64"),
        ({"a": torch.eye(2).to_sparse()}, "of a kind that cannot be read: .*sparse"),
        ({"a": torch.ones(2, device="meta")}, "of a kind that cannot be read: .*device meta"),
        ({"a": torch.ones([1] * 17)}, "of a kind that cannot be read: 17 dimensions"),
        ({"a" * 1001: torch.ones(1)}, "no state dict: .*a key 'aaa"),
    ],
    ids=["nested", "text", "list", "number-key", "no-dict", "tensor", "complex", "sparse", "meta",
         "rank", "long-key"],
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(tmp_path, state, says, zipped):
    with pytest.raises(CheckpointError, match=says):
        index_pickle(save(state, tmp_path / "w.bin", zipped=zipped))


def test_entry_that_is_no_state_dict_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no state dict: 'model' of .*: int"):
        index_pickle(save({"model": 3}, tmp_path / "w.bin"), entry="model")


class Malicious:
    """Makes a file when it is unpickled the ordinary way."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, kind):
    trace = tmp_path / "trace"
    file = tmp_path / "w.bin"
    state = {"a": torch.ones(2), "b": Malicious(trace)}
    if kind == "plain":
        file.write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    else:
        save(state, file, zipped=kind == "zip")
    with pytest.raises(CheckpointError) as caught:
        index_pickle(file)
    assert not trace.exists()
    assert "refused: loading this file would execute code" in str(caught.value)
    assert f"{file}: calls posix.mkdir" in str(caught.value)
    # It would have: the test tests something.
    if kind == "plain":
        pickle.loads(file.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_not_of_torch_that_would_execute_code_is_refused(tmp_path, protocol):
    trace = tmp_path / "trace"
    file = tmp_path / "w.bin"
    file.write_bytes(pickle.dumps({"a": Malicious(trace)}, protocol=protocol))
    with pytest.raises(CheckpointError):
        index_pickle(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "starts with '<!DOCTYPE html>"),
        (b"code\nand more\nof a text", "starts with 'code"),
        (b"\x80\x04N.", "damaged"),
    ],
)
def test_file_of_another_format_is_told_in_plain_words(tmp_path, raw, says):
    (tmp_path / "w.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match=says) as caught:
        index_pickle(tmp_path / "w.bin")
    assert "torch.load" not in str(caught.value)


def test_torch_says_nothing_beside_the_error(tmp_path, capfd):
    class Odd:
        def __reduce__(self):
            storage = torch.ones(3).untyped_storage()
            typed = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (typed, -5, (3,), (1,), False, {})

    file = save({"a": Odd()}, tmp_path / "w.bin")
    capfd.readouterr()
    with pytest.raises(CheckpointError, match="invalid storage offset"):
        index_pickle(file)
    assert capfd.readouterr() == ("", "")


@FORMATS
def test_objects_of_classes_are_refused_by_name(tmp_path, zipped):
    state = {"args": argparse.Namespace(lr=1), "model": {"a": torch.ones(1)}}
    with pytest.raises(CheckpointError, match=r"calls argparse\.Namespace"):
        index_pickle(save(state, tmp_path / "w.bin", zipped=zipped), entry="model")


@pytest.mark.parametrize(
    "raw",
    [b"", b"hello, this is no pickle", b"\x80\x02", b"\x80\x02}q\x00.", b"PK\x03\x04 not a zip",
     b"\x80\x04\x95\xff\xff\xff\xff", pickle.dumps([1]), b"<html>404</html>", os.urandom(1000)],
)  # fmt: skip
def test_what_is_no_pickle_is_refused(tmp_path, raw):
    (tmp_path / "w.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged or not what it should be") as caught:
        index_pickle(tmp_path / "w.bin")
    assert str(tmp_path / "w.bin") in str(caught.value)
    assert "\n" not in str(caught.value)


@FORMATS
def test_truncated_pickle_is_refused(tmp_path, zipped):
    raw = save({"a": torch.ones(1000)}, tmp_path / "w.bin", zipped=zipped).read_bytes()
    for size in (10, 100, len(raw) // 2, len(raw) - 1):
        (tmp_path / "w.bin").write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            index_pickle(tmp_path / "w.bin")


def test_archive_whose_tensor_is_longer_than_its_bytes_is_refused(tmp_path):
    file = save({"a": torch.ones(1000)}, tmp_path / "w.bin")
    short = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(short, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, data[:40] if "/data/" in entry.filename else data)
        # Room enough in the file, not in the entry.
        target.writestr("w/other", b"x" * 10_000)
    file.write_bytes(short.getvalue())
    with pytest.raises(CheckpointError, match="a is longer than its bytes"):
        index_pickle(file)


def rewrite(file: Path, change: Callable[[str, bytes], tuple[bytes, int]]) -> None:
    """Write an archive again, each entry with other data or compressed."""
    written = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(written, "w") as target:
        for entry in source.infolist():
            data, kind = change(entry.filename, source.read(entry))
            target.writestr(zipfile.ZipInfo(entry.filename), data, compress_type=kind)
    file.write_bytes(written.getvalue())


@pytest.mark.parametrize("name", ["data/0", "data.pkl", "byteorder"])
@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, name, kind):
    file = save({"a": torch.arange(1000.0)}, tmp_path / "w.bin")
    rewrite(
        file,
        lambda entry, data: (
            (b"\0" * 10_000_000, kind) if entry.endswith(name) else (data, zipfile.ZIP_STORED)
        ),
    )
    # Even where it could not be.
    file.write_bytes(file.read_bytes().replace(b"\0" * 20, b"\xff" * 20, 1))
    with pytest.raises(CheckpointError, match=f"compressed.*{name}"):
        index_pickle(file)


def test_entry_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path):
    file = save({"a": torch.ones(100)}, tmp_path / "w.bin")
    with zipfile.ZipFile(file) as archive:
        size = archive.getinfo("w/data/0").file_size
    raw = file.read_bytes()
    start = raw.index(b"PK\x01\x02")
    claim = struct.pack("<II", size, size)
    assert raw.count(claim, start) == 1
    directory = raw[start:].replace(claim, struct.pack("<II", 1 << 31, 1 << 31))
    file.write_bytes(raw[:start] + directory)
    with pytest.raises(CheckpointError, match=r"w/data/0' of 2147483648 bytes in a file of"):
        index_pickle(file)


def test_pickle_as_large_as_tensors_are_is_refused_unread(tmp_path):
    file = save({"a": torch.ones(1)}, tmp_path / "w.bin")
    rewrite(
        file,
        lambda entry, data: (b"]" * 17_000_000, 0) if entry.endswith("data.pkl") else (data, 0),
    )
    with pytest.raises(CheckpointError, match=r"data\.pkl' of 17000000 bytes"):
        index_pickle(file)


def test_big_endian_archive_is_read_as_a_whole(tmp_path):
    file = save({"a": torch.ones(2, dtype=torch.int32)}, tmp_path / "w.bin")
    rewrite(file, lambda entry, data: (b"big" if entry.endswith("byteorder") else data, 0))
    weight = index_pickle(file)["a"]
    assert isinstance(weight, PickledTensor)
    assert weight.load().tolist() == [1 << 24] * 2


def test_torchscript_program_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as archive:
        archive.writestr("w/constants.pkl", b"")
        archive.writestr("w/code/model.py", b"pass", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"TorchScript|compressed"):
        index_pickle(tmp_path / "w.bin")


def test_git_lfs_pointer_and_missing_file_are_named_as_such(tmp_path):
    (tmp_path / "w.bin").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        index_pickle(tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match="not found"):
        index_pickle(tmp_path / "none.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        index_pickle(tmp_path)


def test_sharded_pickles_are_read_through_their_index(tmp_path):
    save({"a": torch.ones(1)}, tmp_path / "one.bin")
    save({"b": torch.ones(2)}, tmp_path / "two.bin")
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert {k: w.file.name for k, w in index_pickles(tmp_path).items()} == index["weight_map"]

    save({"a": torch.ones(1)}, tmp_path / "two.bin")
    with pytest.raises(CheckpointError, match=r"in two weight files: a in one\.bin and two\.bin"):
        index_pickles(tmp_path)

    (tmp_path / "two.bin").unlink()
    with pytest.raises(CheckpointError, match=r"1 of the checkpoint's 2 weight files.*two\.bin"):
        index_pickles(tmp_path)

    index["weight_map"]["b"] = "../two.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight file named"):
        index_pickles(tmp_path)


def test_folder_with_one_pickle_or_none(tmp_path):
    with pytest.raises(CheckpointError, match="no PyTorch weights"):
        index_pickles(tmp_path)
    save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(index_pickles(tmp_path)) == {"a"}
