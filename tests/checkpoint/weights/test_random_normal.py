"""Random weights: normal enough, always the same, and fast."""

from __future__ import annotations

import pytest
import torch

from gap_export.checkpoint.weights import TORCH_DTYPES, random_normal
from gap_export.errors import CheckpointError


@pytest.mark.parametrize("shape", [(500, 700), (3,), (0, 4), ()])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_random_values_are_normal_finite_and_always_the_same(shape, dtype):
    def draw(seed: int) -> torch.Tensor:
        return random_normal(shape, std=0.02, seed=seed, dtype=dtype).load()

    first = draw(7)
    assert tuple(first.shape) == shape
    assert first.dtype == TORCH_DTYPES[dtype]
    assert torch.equal(first, draw(7))
    assert torch.isfinite(first).all()
    if first.numel() > 2:
        assert not torch.equal(first, draw(8))
    if first.numel() > 1000:
        values = first.double()
        assert abs(values.mean()) < 2e-4
        assert abs(values.std() - 0.02) < 2e-4
        # No two rows alike: a matrix of equal rows would be of rank 1.
        assert torch.linalg.matrix_rank(values) == 500


def test_random_values_too_wide_for_the_dtype_are_refused():
    with pytest.raises(CheckpointError, match="does not fit float16: random values of seed 1"):
        random_normal((3,), std=1e6, seed=1, dtype="F16").load()
