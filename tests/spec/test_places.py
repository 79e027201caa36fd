"""Where tokens are, and how RoPE turns them there, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gap_export.spec.architecture import DecoderShape
from gap_export.spec.manifest import GridSpec
from gap_export.spec.places import rope_sums, token_places
from tests.pruning import slow

GRID = GridSpec(rows=3, cols=5)
ONE_AXIS = DecoderShape(
    hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_key_value_heads=2,
    head_dim=16, vocab_size=9, max_position_embeddings=99, rms_norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
RUNS = replace(ONE_AXIS, rope_theta=1e6, rope_sections=(2, 3, 3))
TURNS = replace(RUNS, rope_sections=(4, 2, 2), rope_interleaved=True)


def test_places_are_rows_and_columns_in_raster_order():
    wanted = [[row, col] for row in range(3) for col in range(5)]
    assert token_places(GRID).tolist() == wanted


@pytest.mark.parametrize(
    ("decoder", "axes"),
    [
        (ONE_AXIS, [0] * 8),
        (replace(ONE_AXIS, rotary_dim=8), [0] * 4),
        (RUNS, [0, 0, 1, 1, 1, 2, 2, 2]),
        (TURNS, [0, 1, 2, 0, 1, 2, 0, 0]),
    ],
)
def test_rope_sums_equal_the_slow_ones(decoder, axes):
    wanted = slow.rope_sums(GRID.rows, GRID.cols, decoder.rope_theta, axes)
    assert decoder.frequency_axes() == tuple(axes)
    assert np.abs(rope_sums(GRID, decoder) - wanted).max() < 1e-6
