from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from gap_export.graph.passes.drop_zero_bias import DropZeroBias
from tests.graph.lowering_models import kinds, parse, run

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((5, 3, 2, 2)).astype(np.float32)
X = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)

CONV = """
g (float[n, 3, 4, 4] x, float[5, 3, 2, 2] w) => (float[n, 5, 2, 2] y) {
    number = Constant <value = float {0.0}> ()
    channels = Constant <value = int64[1] {5}> ()
    bias = Expand (number, channels)
    y = Conv <strides = [2, 2]> (x, w, bias)
}"""


def test_zero_bias_goes_with_the_same_result():
    model = parse(CONV, w=WEIGHT)
    before = run(model, x=X)[0]
    assert DropZeroBias().run(model)
    assert kinds(model) == ["Conv"]
    assert len(next(iter(model.graph)).inputs) == 2
    np.testing.assert_array_equal(run(model, x=X)[0], before)
    assert not DropZeroBias().run(model)


@pytest.mark.parametrize(
    "change",
    [
        ("float {0.0}", "float {0.5}"),
        ("Expand (number, channels)", "Tile (number, channels)"),
        ("bias = Expand", "other = Expand"),
        ("(x, w, bias)", "(x, w)"),
    ],
)
def test_other_biases_stay(change):
    text = CONV.replace(*change)
    if "other" in text:
        text = text.replace("float[5, 3, 2, 2] w)", "float[5, 3, 2, 2] w, float[5] bias)")
    if "Tile" in text:
        text = text.replace("float {0.0}", "float[1] {0.0}")
    model = parse(text, w=WEIGHT)
    assert not DropZeroBias().run(model)


def test_bias_others_read_stays_for_them():
    text = CONV.replace("=> (float[n, 5, 2, 2] y)", "=> (float[n, 5, 2, 2] y, float[5] bias)")
    model = parse(text, w=WEIGHT)
    before = run(model, x=X)
    DropZeroBias().run(model)
    after = run(model, x=X)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new, old)


def test_an_external_bias_is_not_read():
    model = parse(CONV.replace("bias = Expand (number, channels)\n", "").replace(
        "float[5, 3, 2, 2] w)", "float[5, 3, 2, 2] w, float[5] bias)"), w=WEIGHT)  # fmt: skip
    (bias,) = (value for value in model.graph.inputs if value.name == "bias")
    model.graph.inputs.remove(bias)
    bias.const_value = ir.ExternalTensor(
        "nowhere.safetensors", 0, 20, ir.DataType.FLOAT, shape=ir.Shape([5]), name="bias"
    )
    model.graph.register_initializer(bias)
    assert not DropZeroBias().run(model)
