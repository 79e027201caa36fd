"""INT4 weights: against a slow reference of our own, ONNX's reader and ONNX Runtime."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from gap_export.checkpoint.weights import (
    DerivedWeight,
    check_blocks,
    dequantize,
    filled,
    quantize_columns,
    quantized,
    quantized_bytes,
    random_normal,
    read_header,
    store_quantized,
    weight,
)
from gap_export.errors import CheckpointError, UsageError
from tests.programs import run_program


def made(tensor: torch.Tensor, dtype: str = "F32") -> DerivedWeight:
    return DerivedWeight(
        dtype=dtype, shape=tuple(tensor.shape), sources=(), compute=lambda: tensor, origin="made"
    )


def drawn(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def slow_scale(largest: np.float32) -> np.float32:
    """Max / 7 with 8 significant bits, done with integers."""
    if largest == 0:
        return np.float32(1.0)
    exact = np.float32(largest / np.float32(7))
    fraction, exponent = np.frexp(np.float64(np.float16(exact)))
    rounded = np.float64(round(float(fraction) * 256)) * 2.0 ** (int(exponent) - 8)
    return np.float32(max(rounded, 2.0**-17))


def slow_quantize(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Int8 [K, N] and float32 scales [K / block, N], value by value."""
    rows, width = weight.shape
    steps = np.zeros((width, rows), dtype=np.int8)
    scales = np.zeros((width // block_size, rows), dtype=np.float32)
    for out in range(rows):
        for block in range(width // block_size):
            values = weight[out, block * block_size : (block + 1) * block_size].astype(np.float32)
            scale = scales[block, out] = slow_scale(np.max(np.abs(values)))
            for index, value in enumerate(values):
                nearest = int(np.rint(np.float32(value / scale)))
                steps[block * block_size + index, out] = max(-7, min(7, nearest))
    return steps, scales


def slow_pack(steps: np.ndarray) -> bytes:
    """Two values a byte, the first in the low half."""
    flat = [int(value) & 15 for value in steps.reshape(-1)]
    return bytes(flat[i] | flat[i + 1] << 4 for i in range(0, len(flat), 2))


def read(folder: Path, place) -> bytes:
    return (folder / place.location).read_bytes()[place.offset : place.offset + place.length]


def floats(raw: bytes, dtype: str) -> np.ndarray:
    torch_dtype = weight.TORCH_DTYPES[dtype]
    return torch.frombuffer(bytearray(raw), dtype=torch_dtype).to(torch.float32).numpy()


@pytest.mark.parametrize("chunk", [7, 1000, 1 << 20])
@pytest.mark.parametrize(
    ("rows", "width", "block"), [(5, 64, 32), (1, 128, 128), (7, 192, 64), (6, 160, 32)]
)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_file_holds_what_the_slow_reference_says(
    tmp_path, monkeypatch, chunk, rows, width, block, dtype
):
    monkeypatch.setattr(quantized, "CHUNK", chunk)
    tensors = {f"w{i}": drawn(rows, width, seed=i).to(weight.TORCH_DTYPES[dtype]) for i in range(3)}
    written: list[int] = []
    given_weights = {name: made(tensor, dtype) for name, tensor in tensors.items()}
    places = store_quantized(
        tmp_path / "int4.safetensors",
        given_weights,
        block_size=block,
        dtypes=["F16", "F32", "BF16"],
        advance=written.append,
    )
    assert sum(written) == quantized_bytes(
        given_weights, block_size=block, dtypes=["F16", "F32", "BF16"]
    )
    for name, tensor in tensors.items():
        steps, scales = slow_quantize(tensor.float().numpy(), block)
        place = places[name]
        assert (place.shape, place.block_size) == ((width, rows), block)
        assert read(tmp_path, place.packed) == slow_pack(steps)
        for scale_dtype, held in place.scales.items():
            assert held.shape == (width // block, rows)
            np.testing.assert_array_equal(
                floats(read(tmp_path, held), scale_dtype).reshape(held.shape), scales
            )
    # Read by the safetensors library, and by our own reader, which refuses holes.
    loaded = load_file(tmp_path / "int4.safetensors")
    assert loaded["w1.int4"].dtype == torch.uint8
    assert loaded["w1.scales.bfloat16"].dtype == torch.bfloat16
    assert set(read_header(tmp_path / "int4.safetensors")) == set(loaded)


@pytest.mark.parametrize("rows", [4, 5])
def test_onnx_and_onnx_runtime_read_the_values_that_were_meant(tmp_path, rows):
    import onnxruntime

    tensor = drawn(rows, 64)
    place = store_quantized(
        tmp_path / "q.safetensors", {"w": made(tensor)}, block_size=32, dtypes=["F32"]
    )["w"]
    steps, scales = slow_quantize(tensor.numpy(), 32)
    packed = TensorProto(
        name="w", data_type=TensorProto.INT4, dims=[64, rows], raw_data=read(tmp_path, place.packed)
    )
    np.testing.assert_array_equal(numpy_helper.to_array(packed).astype(np.int8), steps)
    held = read(tmp_path, place.scales["F32"])
    factors = numpy_helper.from_array(np.frombuffer(held, np.float32).reshape(2, rows), "s")
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0, block_size=32)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, rows])
    graph = helper.make_graph([node], "g", [], [output], [packed, factors])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {})[0], steps * np.repeat(scales, 32, axis=0))


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.floats(-4e5, 4e5, width=32) | st.floats(-(2**-10), 2**-10, width=32) | st.just(0.0),
        min_size=32,
        max_size=32,
    )
)
def test_no_value_is_further_off_than_half_a_step(values):
    block = torch.tensor([values], dtype=torch.float32)
    steps, scales = quantize_columns(block, block_size=32)
    scale = float(scales)
    assert -7 <= int(steps.min()) <= int(steps.max()) <= 7
    lost = (steps.double() * scale - block.reshape(1, 1, 32).double()).abs().max()
    assert float(lost) <= 0.501 * scale
    # The very same number in every dtype that a graph may have.
    for dtype in (torch.float16, torch.bfloat16):
        assert float(scales.to(dtype).float()) == scale
    mirrored, _ = quantize_columns(-block, block_size=32)
    assert torch.equal(mirrored, -steps)
    assert not steps[block.reshape(1, 1, 32) == 0].any()


def test_largest_weight_of_each_sign_is_held_to_half_a_percent():
    block = torch.zeros(1, 32)
    block[0, 3], block[0, 7] = 0.3, -0.3
    steps, scales = quantize_columns(block, block_size=32)
    assert steps[0, 0, 3] == 7
    assert steps[0, 0, 7] == -7
    assert float(scales * 7) == pytest.approx(0.3, rel=2**-8)


def test_blocks_of_zeros_and_of_denormals_have_scales_nobody_stumbles_over():
    columns = torch.zeros(3, 64)
    columns[1, :32] = 1e-42
    columns[2, 32:] = 2e-6
    steps, scales = quantize_columns(columns, block_size=32)
    assert scales[..., 0].tolist() == [[1.0, 1.0], [2.0**-17, 1.0], [1.0, 2.0**-17]]
    assert not steps.any()


def spoiled(value: float) -> torch.Tensor:
    tensor = drawn(4, 64)
    tensor[3, 63] = value
    return tensor


@pytest.mark.parametrize(
    ("tensor", "dtype", "message"),
    [
        *(
            (spoiled(float(value)), "F32", r"not finite: layer \(made\)")
            for value in ("nan", "inf", "-inf")
        ),
        (spoiled(-1e6), "F32", r"too large .* layer \(made\), largest value 1e\+06"),
        (torch.zeros(32), "F32", "weight layer"),
        (torch.zeros(0, 32), "F32", "weight layer"),
        (torch.zeros(2, 2, 32), "F32", "weight layer"),
        (torch.zeros(2, 32, dtype=torch.int8), "I8", "weight layer"),
    ],
)
def test_what_cannot_be_quantized_is_refused(tmp_path, tensor, dtype, message):
    weights = {"fine": made(drawn(4, 64)), "layer": made(tensor, dtype)}
    with pytest.raises(CheckpointError, match=message):
        store_quantized(tmp_path / "q.safetensors", weights, block_size=32, dtypes=["F16"])
    assert list(tmp_path.iterdir()) == []


def test_block_that_does_not_divide_says_which_layer_and_which_blocks_do(tmp_path):
    weights = {
        "layers.0.mlp.up_proj.weight": filled((4, 256), 1.0, "F32"),
        "layers.0.mlp.down_proj.weight": filled((4, 320), 1.0, "F32"),
    }
    with pytest.raises(UsageError) as caught:
        store_quantized(tmp_path / "q.safetensors", weights, block_size=128, dtypes=["F16"])
    assert str(caught.value) == (
        "an INT4 block of 128 does not divide the input of layers.0.mlp.down_proj.weight: "
        "width 320; allowed: 32, 64 for this layer; "
        "use a block of 32 or 64, which fits every layer"
    )
    assert list(tmp_path.iterdir()) == []


def test_width_that_no_block_divides_leads_to_a_float_dtype():
    with pytest.raises(UsageError, match=r"width 100; allowed: none of 32, 64, 128 .* float dtype"):
        check_blocks({"odd": filled((4, 100), 1.0, "F32")}, block_size=32)


@pytest.mark.parametrize("block", [0, 16, 96, 256])
def test_block_sizes_that_are_not_offered_are_refused(block):
    with pytest.raises(UsageError, match="allowed: 32, 64, 128"):
        check_blocks({"w": filled((4, 768), 1.0, "F32")}, block_size=block)


def test_interrupted_file_goes_away(tmp_path):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_quantized(
            tmp_path / "q.safetensors",
            {"w": made(drawn(4, 64))},
            block_size=32,
            dtypes=["F16"],
            advance=stop,
        )
    assert list(tmp_path.iterdir()) == []


def test_one_weight_is_in_memory_at_a_time(tmp_path):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def compute() -> torch.Tensor:
        nonlocal most
        gc.collect()
        tensor = torch.ones(10, 64)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    weights = {
        f"w{i}": DerivedWeight(dtype="F32", shape=(10, 64), sources=(), compute=compute, origin="w")
        for i in range(10)
    }
    store_quantized(tmp_path / "q.safetensors", weights, block_size=32, dtypes=["F16"])
    assert most == 1


PEAK = """
import sys
from pathlib import Path
from gap_export.checkpoint.weights import index_files, store_quantized
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
folder = Path(sys.argv[1])
save_file({f"w{i}": torch.ones(2048, 4096).half() for i in range(6)}, folder / "a.st")
refs = index_files([folder / "a.st"])
# Runs every code path once, so that what stays is not counted.
store_quantized(folder / "small.st", {"w": refs["w0"]}, block_size=32, dtypes=["F16"])
Path("/proc/self/clear_refs").write_text("5")
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
before = peak()
store_quantized(folder / "out.st", refs, block_size=32, dtypes=["F16", "F32"])
print(peak() - before, 2048 * 4096 * 2)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs a Linux /proc")
def test_peak_of_memory_is_that_of_one_weight_and_some_pieces(tmp_path):
    done = run_program([sys.executable, "-c", PEAK, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    grown, one = map(int, done.stdout.split())
    # All six are 100 MB, and one in float32 another 34.
    assert grown < one + (32 << 20)


def test_random_weights_of_a_seed_quantize_to_the_same_bytes_each_time(tmp_path):
    source = random_normal((64, 128), std=0.02, seed=3, dtype="F16")
    for name in ("a", "b"):
        store_quantized(tmp_path / name, {"w": source}, block_size=128, dtypes=["F16"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("rows", "block"), [(5, 32), (6, 64)])
def test_weight_is_read_back_as_graphs_compute_with_it(tmp_path, rows, block):
    path, tensor = tmp_path / "q.safetensors", drawn(rows, 128)
    store_quantized(
        path, {"x": made(drawn(3, 64)), "w": made(tensor)}, block_size=block, dtypes=["F16"]
    )
    steps, scales = slow_quantize(tensor.numpy(), block)
    wanted = (steps * np.repeat(scales, block, axis=0)).T
    np.testing.assert_array_equal(dequantize(path, "w").numpy(), wanted)
    assert {-7, 7} <= set(steps.reshape(-1).tolist())


def test_weight_that_is_not_quantized_is_not_read_back(tmp_path):
    path = tmp_path / "q.safetensors"
    store_quantized(path, {"w": made(drawn(3, 64))}, block_size=32, dtypes=["F16"])
    with pytest.raises(CheckpointError, match="no quantized weight lm_head"):
        dequantize(path, "lm_head")
