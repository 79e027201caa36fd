"""Computations on weights against plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gap_export.checkpoint.weights import (
    DerivedWeight,
    TensorRef,
    Weight,
    add,
    add_rows,
    cast,
    filled,
    index_files,
    merge_lora,
    reshaped,
    rows,
    weight,
)
from gap_export.errors import CheckpointError


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in pieces that do not divide the tensors evenly."""
    from gap_export.checkpoint.weights import derived

    monkeypatch.setattr(weight, "CHUNK", 7)
    monkeypatch.setattr(derived, "CHUNK", 7)


@pytest.fixture
def stored(tmp_path: Path):
    """Puts tensors into a file and gives them back as references."""

    def store(**tensors: torch.Tensor) -> list[TensorRef]:
        file = tmp_path / f"{'-'.join(tensors)}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        found = index_files([file])
        return [found[key] for key in tensors]

    return store


def derived_of(source: Weight) -> DerivedWeight:
    """The same weight, but not as bytes in a file."""
    return DerivedWeight(
        dtype=source.dtype,
        shape=source.shape,
        sources=(source,),
        compute=lambda tensor: tensor.clone(),
        origin="derived",
    )


def test_cast_is_torchs(stored):
    values = torch.randn(5, 9)
    (ref,) = stored(a=values)
    half = cast(ref, "F16")
    assert (half.dtype, half.shape, half.origin) == ("F16", (5, 9), ref.origin)
    assert torch.equal(half.load(), values.half())
    assert torch.equal(cast(ref, "BF16").load(), values.bfloat16())
    assert cast(ref, "F32") is ref


@pytest.mark.parametrize("place", [0, 6, 7, 8, 44])
@pytest.mark.parametrize("value", [70000.0, -1e30])
def test_cast_that_overflows_names_the_weight_and_its_largest_value(stored, place, value):
    values = torch.zeros(5, 9)
    values.view(-1)[place] = value
    (ref,) = stored(a=values)
    with pytest.raises(CheckpointError) as caught:
        cast(ref, "F16").load()
    assert "does not fit float16" in str(caught.value)
    assert f"{ref.origin}, largest value {abs(value):g}" in str(caught.value)
    assert "--dtype bfloat16 or float32" in str(caught.value)
    assert torch.equal(cast(ref, "BF16").load(), values.bfloat16())


@pytest.mark.parametrize("place", [0, 6, 20, 44])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_cast_of_values_that_are_not_finite_says_so(stored, place, value):
    values = torch.ones(5, 9)
    values.view(-1)[place] = value
    (ref,) = stored(a=values)
    with pytest.raises(CheckpointError, match="holds values that are not finite: a in"):
        cast(ref, "F16").load()


def test_add_rounds_once_to_the_first_dtype(stored):
    a, b = torch.randn(3, 5).half(), torch.randn(3, 5).bfloat16()
    total = add(*stored(a=a, b=b))
    assert total.dtype == "F16"
    assert torch.equal(total.load(), (a.float() + b.float()).half())
    scalar = add(*stored(c=torch.tensor(2.0), d=torch.tensor(0.5)))
    assert scalar.load().item() == 2.5


def test_add_that_overflows_is_refused(stored):
    big = torch.full((3, 5), 40000.0).half()
    with pytest.raises(CheckpointError, match=r"does not fit float16: a in .* \+ b in .*80000"):
        add(*stored(a=big, b=big.clone())).load()


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (15,), (3, 5, 1)])
def test_add_of_different_shapes_is_refused(stored, shape):
    refs = stored(a=torch.ones(3, 5), b=torch.ones(shape))
    with pytest.raises(CheckpointError, match=r"together: b in .*allowed: shape \[3, 5\]"):
        add(*refs)


@pytest.mark.parametrize("count", [0, 1, 3, 10, 11])
@pytest.mark.parametrize("width", [(3,), (2, 2), ()])
def test_add_rows_leaves_the_rows_beyond(stored, count, width):
    delta, base = torch.randn(11, *width).half(), torch.randn(count, *width).half()
    total = add_rows(*stored(delta=delta, base=base))
    expected = delta.clone()
    expected[:count] = (delta[:count].float() + base.float()).half()
    assert torch.equal(total.load(), expected)
    assert total.shape == delta.shape


@pytest.mark.parametrize("shape", [(12, 3), (5, 4), (5,), (5, 3, 1), ()])
def test_add_rows_of_what_does_not_fit_is_refused(stored, shape):
    refs = stored(delta=torch.ones(11, 3), base=torch.ones(shape))
    with pytest.raises(CheckpointError, match="do not go together: base in"):
        add_rows(*refs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merge_lora_is_the_product_in_float32(stored, dtype):
    base, down, up = torch.randn(13, 6), torch.randn(2, 6), torch.randn(13, 2)
    base, down, up = base.to(dtype), down.to(dtype), up.to(dtype)
    merged = merge_lora(*stored(base=base, down=down, up=up), 0.25).load()
    expected = base.double() + 0.25 * (up.double() @ down.double())
    assert merged.dtype == dtype
    # Half a step of rounding, and a little for the sums in float32.
    step = torch.finfo(dtype).eps
    assert ((merged.double() - expected).abs() <= expected.abs() * step * 0.51 + 1e-6).all()


def test_merge_lora_reads_its_sources_without_changing_them(stored):
    base, down, up = stored(base=torch.ones(4, 3), down=torch.ones(1, 3), up=torch.ones(4, 1))
    held = base.load()
    source = DerivedWeight(dtype="F32", shape=(4, 3), sources=(), compute=lambda: held, origin="x")
    assert torch.equal(merge_lora(source, down, up, 2.0).load(), torch.full((4, 3), 3.0))
    assert torch.equal(add(source, source).load(), torch.full((4, 3), 2.0))
    assert torch.equal(held, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("base", "down", "up"),
    [((4, 3), (2, 4), (4, 2)), ((4, 3), (2, 3), (5, 2)), ((4, 3), (2, 3), (4, 1)),
     ((4,), (2, 4), (4, 2)), ((4, 3), (), (4, 2))],
)  # fmt: skip
def test_merge_lora_of_what_does_not_fit_is_refused(stored, base, down, up):
    refs = stored(base=torch.ones(base), down=torch.ones(down), up=torch.ones(up))
    with pytest.raises(CheckpointError, match=r"do not go together|belongs to a matrix"):
        merge_lora(*refs, 1.0)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 12), (11, 12), (5, 5), (0, 12)])
def test_rows_are_a_slice(stored, start, stop):
    values = torch.randn(12, 3).half()
    (ref,) = stored(qkv=values)
    part = rows(ref, start, stop)
    assert isinstance(part, TensorRef)
    assert part.offset == ref.offset + start * 6
    assert part.shape == (stop - start, 3)
    assert torch.equal(part.load(), values[start:stop])
    assert torch.equal(rows(derived_of(ref), start, stop).load(), values[start:stop])
    assert rows(derived_of(ref), start, stop).load().is_contiguous()


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (4, 13), (5, 4)])
def test_rows_that_are_not_there_are_refused(stored, start, stop):
    (ref,) = stored(qkv=torch.ones(12, 3))
    with pytest.raises(CheckpointError, match="has no rows"):
        rows(ref, start, stop)


def test_rows_of_a_scalar_are_refused(stored):
    with pytest.raises(CheckpointError, match="has no rows"):
        rows(stored(scalar=torch.tensor(1.0))[0], 0, 0)


def test_reshaped_keeps_the_bytes(stored):
    values = torch.randn(4, 6)
    (ref,) = stored(a=values)
    other = reshaped(ref, (2, 2, 6))
    assert isinstance(other, TensorRef)
    assert torch.equal(other.load(), values.reshape(2, 2, 6))
    assert torch.equal(reshaped(derived_of(ref), (24,)).load(), values.reshape(24))
    with pytest.raises(CheckpointError, match=r"does not reshape to \[5, 5\]: a in"):
        reshaped(ref, (5, 5))


def test_filled_is_the_value_everywhere():
    ones = filled((2, 3), 1.0, "BF16")
    assert torch.equal(ones.load(), torch.ones(2, 3, dtype=torch.bfloat16))
    assert (ones.dtype, ones.shape, ones.sources) == ("BF16", (2, 3), ())
