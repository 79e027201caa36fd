"""The file of streamed weights: read back by the safetensors library, written piece by piece."""

from __future__ import annotations

import errno
import gc
import json
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gap_export.checkpoint.weights import (
    DerivedWeight,
    PlacedTensor,
    TensorRef,
    cast,
    filled,
    index_files,
    place_reference,
    placing,
    read_header,
    rows,
    store_weights,
    weight,
)
from gap_export.errors import CheckpointError
from tests.programs import run_program


def made(tensor: torch.Tensor, dtype: str = "F32", origin: str = "made") -> DerivedWeight:
    return DerivedWeight(
        dtype=dtype, shape=tuple(tensor.shape), sources=(), compute=lambda: tensor, origin=origin
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight, "CHUNK", 7)
    monkeypatch.setattr(placing, "CHUNK", 7)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_file_is_read_by_the_safetensors_library(tmp_path, dtype):
    tensors = {
        "b": torch.randn(5, 9),
        "a": torch.randn(3),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "last": torch.randn(2, 1, 3),
    }
    path = tmp_path / "weights.safetensors"
    written: list[int] = []
    placed = store_weights(
        path, {k: made(v) for k, v in tensors.items()}, dtype=dtype, advance=written.append
    )
    torch_dtype = weight.TORCH_DTYPES[dtype]
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    raw = path.read_bytes()
    for key, tensor in tensors.items():
        expected = tensor.to(torch_dtype)
        assert torch.equal(loaded[key], expected)
        place = placed[key]
        assert (place.location, place.dtype) == ("weights.safetensors", dtype)
        assert place.shape == tuple(tensor.shape)
        values = raw[place.offset : place.offset + place.length]
        assert values == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert sum(written) == sum(place.length for place in placed.values())
    # The other way round: our own reader, which refuses holes and overlaps.
    assert {k: r.offset for k, r in read_header(path).items()} == {
        k: p.offset for k, p in placed.items()
    }
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_weights_from_other_files_are_cast_on_the_way(tmp_path):
    source = tmp_path / "source.safetensors"
    values = torch.randn(6, 4)
    save_file({"w": values, "half": values.half()}, source)
    refs = index_files([source])
    path = tmp_path / "out.safetensors"
    store_weights(
        path,
        {"w": refs["w"], "half": refs["half"], "part": rows(refs["w"], 2, 4),
         "brain": cast(refs["w"], "BF16")},
        dtype="F16",
    )  # fmt: skip
    loaded = load_file(path)
    assert torch.equal(loaded["w"], values.half())
    assert torch.equal(loaded["half"], values.half())
    assert torch.equal(loaded["part"], values[2:4].half())
    assert torch.equal(loaded["brain"], values.bfloat16().half())


def test_one_weight_under_two_names_is_stored_once(tmp_path):
    shared, alike = filled((4, 4), 1.0, "F32"), filled((4, 4), 1.0, "F32")
    path = tmp_path / "w.safetensors"
    placed = store_weights(path, {"embed": shared, "other": alike, "lm_head": shared}, dtype="F32")
    assert placed["lm_head"] == placed["embed"]
    assert placed["other"].offset != placed["embed"].offset
    assert set(load_file(path)) == {"embed", "other"}


def test_empty_file_is_one_all_the_same(tmp_path):
    assert store_weights(tmp_path / "w.safetensors", {}, dtype="F32") == {}
    assert load_file(tmp_path / "w.safetensors") == {}


@pytest.mark.usefixtures("small_pieces")
def test_overflow_is_refused_with_name_value_and_way_out(tmp_path):
    values = torch.zeros(5, 9)
    values[4, 8] = -123456.0
    path = tmp_path / "w.safetensors"
    weights = {"fine": filled((3,), 1.0, "F32"), "q_proj": made(values, origin="q in file")}
    with pytest.raises(CheckpointError) as caught:
        store_weights(path, weights, dtype="F16")
    assert "does not fit float16: q_proj (q in file), largest value 123456" in str(caught.value)
    assert "--dtype bfloat16 or float32" in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    with pytest.raises(CheckpointError, match=r"not finite: w \(made\)"):
        store_weights(
            tmp_path / "w.safetensors", {"w": made(torch.tensor([1.0, value]))}, dtype=dtype
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_floats_are_refused(tmp_path):
    save_file({"ids": torch.arange(3)}, tmp_path / "w.safetensors")
    refs = index_files([tmp_path / "w.safetensors"])
    with pytest.raises(CheckpointError, match="ids is not of a float dtype: I64"):
        store_weights(tmp_path / "out.safetensors", refs, dtype="F16")
    assert not (tmp_path / "out.safetensors").exists()


def test_file_in_the_way_is_kept(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        store_weights(path, {"w": filled((3,), 1.0, "F32")}, dtype="F32")
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_interrupted_file_goes_away(tmp_path, error):
    def fail(_: int) -> None:
        raise error

    path = tmp_path / "w.safetensors"
    with pytest.raises(type(error)):
        store_weights(path, {"w": filled((3,), 1.0, "F32")}, dtype="F32", advance=fail)
    assert not path.exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
from gap_export.bundle import write_bundle
from gap_export.errors import OutputError
from gap_export.checkpoint.weights import filled, store_weights
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with write_bundle(Path(sys.argv[1])) as draft:
        weights = {"w": filled((1 << 20,), 1.0, "F32")}
        store_weights(draft.folder / "w.safetensors", weights, dtype="F32")
except OutputError as err:
    print(err)
"""


def test_disk_that_does_not_take_the_file_is_one_clear_error(tmp_path):
    done = run_program([sys.executable, "-c", FULL_DISK, str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert "the bundle cannot be written" in done.stdout
    assert "does not take files of that size" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_before_the_first_weight_is_read(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def load() -> torch.Tensor:
        raise AssertionError("read")

    late = DerivedWeight(dtype="F32", shape=(3,), sources=(), compute=load, origin="late")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        store_weights(tmp_path / "w.safetensors", {"w": late}, dtype="F32")
    assert list(tmp_path.iterdir()) == []


def test_one_weight_is_in_memory_at_a_time(tmp_path):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def compute() -> torch.Tensor:
        nonlocal most
        gc.collect()
        tensor = torch.ones(1000)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    weights = {
        f"w{i}": DerivedWeight(dtype="F32", shape=(1000,), sources=(), compute=compute, origin="w")
        for i in range(10)
    }
    store_weights(tmp_path / "w.safetensors", weights, dtype="F16")
    assert most == 1


PEAK = """
import resource, sys
from pathlib import Path
from gap_export.checkpoint.weights import add, cast, index_files, merge_lora, store_weights
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name in "ab":
    tensors = {f"{name}{i}": torch.ones(2048, 4096).half() for i in range(3)}
    save_file(tensors, folder / f"{name}.st")
refs = index_files([folder / "a.st", folder / "b.st"])
# Runs every code path once, so that what stays is not counted.
store_weights(folder / "small.st", {"w": cast(refs["a0"], "F32")}, dtype="F32")
Path("/proc/self/clear_refs").write_text("5")
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
before = peak()
weights = {f"w{i}.{j}": add(refs[f"a{i}"], refs[f"b{i}"]) for i in range(3) for j in range(4)}
store_weights(folder / "out.st", weights, dtype="F16")
print(peak() - before, 2048 * 4096 * 2)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs a Linux /proc")
def test_peak_of_memory_is_that_of_one_weight_and_its_sources(tmp_path):
    done = run_program([sys.executable, "-c", PEAK, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    grown, one = map(int, done.stdout.split())
    # Result and both sources, plus pieces in float32; all twelve would be 192 MB.
    assert grown < 3.5 * one + (24 << 20)


def test_reference_is_placed_where_it_lies(tmp_path):
    ref = TensorRef(file=tmp_path / "x", key="w", dtype="F16", shape=(2, 3), offset=64, length=12)
    assert place_reference(ref, "model.safetensors") == PlacedTensor(
        location="model.safetensors", dtype="F16", shape=(2, 3), offset=64, length=12
    )


def test_header_is_plain_json_with_offsets_from_the_data(tmp_path):
    path = tmp_path / "w.safetensors"
    store_weights(path, {"w": filled((3,), 1.0, "F32")}, dtype="F32")
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["w"] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
