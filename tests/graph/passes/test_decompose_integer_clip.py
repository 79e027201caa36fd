from __future__ import annotations

import numpy as np
import pytest

from gap_export.graph.passes.decompose_integer_clip import DecomposeIntegerClip
from tests.graph.lowering_models import kinds, parse, run

CLIP = """
g (int64[n] x, int64 low, int64 high) => (int64[n] y) {
    y = Clip (x, low, high)
}"""
NUMBERS = {"low": np.array(-2), "high": np.array(5)}
X = np.array([-(2**62), -3, -2, 0, 5, 6, 2**53 + 1])


def clip(arguments: str) -> str:
    return CLIP.replace("(x, low, high)", arguments)


@pytest.mark.parametrize(
    ("arguments", "operators"),
    [
        ("(x, low, high)", ["Max", "Min"]),
        ("(x, low)", ["Max"]),
        ('(x, "", high)', ["Min"]),
        # Above its own upper bound.
        ("(x, high, low)", ["Max", "Min"]),
    ],
)
def test_clip_becomes_max_and_min_with_the_same_result(arguments, operators):
    before = parse(clip(arguments), **NUMBERS)
    model = parse(clip(arguments), **NUMBERS)
    truth = run(before, x=X)[0]
    assert DecomposeIntegerClip().run(model)
    assert kinds(model) == operators
    np.testing.assert_array_equal(run(model, x=X)[0], truth)
    assert not DecomposeIntegerClip().run(model)


@pytest.mark.parametrize("text", [clip("(x)"), CLIP.replace("int64", "float")])
def test_clip_of_floats_or_without_bounds_stays(text):
    kind = np.float32 if "float" in text else np.int64
    model = parse(text, **{name: number.astype(kind) for name, number in NUMBERS.items()})
    assert not DecomposeIntegerClip().run(model)
    assert kinds(model) == ["Clip"]
