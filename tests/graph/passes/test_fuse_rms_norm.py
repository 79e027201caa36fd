from __future__ import annotations

import re

import numpy as np
import pytest

from gap_export.graph.passes.fuse_rms_norm import FuseRmsNorm
from gap_export.graph.passes.raise_opset import RaiseOpset
from tests.graph.lowering_models import changed, check_declined, kinds, parse, run

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal(8).astype(np.float16)
X = (RNG.standard_normal((5, 8)) * 100).astype(np.float16)

# ONNX Runtime rounds in between where it does not fuse the nodes by itself.
ONE_ROUNDING = 2.0**-10

MISSED = "1 places resemble the pattern and do not match it: Reciprocal .*; use the portable"

NORM = """
norm (float16[n, 8] x, float16[8] weight) => (float16[n, 8] y) {
    two = Constant <value = float {2.0}> ()
    axes = Constant <value = int64[1] {-1}> ()
    epsilon = Constant <value = float {0.001}> ()
    wide = Cast <to = 1> (x)
    square = Pow (wide, two)
    mean = ReduceMean <keepdims = 1> (square, axes)
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    inverse = Reciprocal (root)
    scaled = Mul (wide, inverse)
    narrow = Cast <to = 10> (scaled)
    y = Mul (weight, narrow)
}"""


def norm(*changes: tuple[str, str]):
    return parse(changed(NORM, *changes), weight=WEIGHT)


@pytest.mark.parametrize(
    "order", [("Mul (weight, narrow)", "Mul (narrow, weight)"), ("two", "two")]
)
def test_norm_becomes_one_node_with_the_same_result(order):
    model = norm(order, ("Mul (wide, inverse)", "Mul (inverse, wide)"))
    before = run(model, x=X)
    assert RaiseOpset().run(model)
    assert FuseRmsNorm().run(model)
    assert kinds(model) == ["RMSNormalization"]
    (node,) = model.graph
    assert [value.name for value in node.inputs] == ["x", "weight"]
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-3)
    after = run(model, x=X)
    np.testing.assert_allclose(after[0], before[0], rtol=ONE_ROUNDING)
    wide = X.astype(np.float32)
    truth = WEIGHT * wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(after[0], truth, rtol=2 * ONE_ROUNDING)
    assert not FuseRmsNorm().run(model)


@pytest.mark.parametrize(
    "change",
    [
        # Neither is a Reciprocal of a Sqrt: nothing that could be taken for a norm.
        ("Reciprocal (root)", "Neg (root)"),
        ("Sqrt (shifted)", "Exp (shifted)"),
    ],
)
def test_what_is_no_norm_stays(change):
    # That it changed nothing, run() has made sure of.
    assert not FuseRmsNorm().run(norm(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("float {2.0}", "float {3.0}"), MISSED),
        (("int64[1] {-1}", "int64[1] {0}"), "the mean is not over the last axis"),
        (("Mul (wide, inverse)", "Mul (square, inverse)"), MISSED),
        (("Add (mean, epsilon)", "Add (mean, wide)"), "epsilon is not one number: wide of Cast"),
        (("Mul (weight, narrow)", "Mul (x, narrow)"), "not what is handled: FLOAT16, x"),
        (("Mul (weight, narrow)", "Add (weight, narrow)"), MISSED),
        (("wide = Cast <to = 1> (x)", "cast = Cast <to = 1> (x)\n    wide = Exp (cast)"),
         MISSED),
    ],
)  # fmt: skip
def test_near_miss_is_refused_and_left(change, message):
    check_declined(FuseRmsNorm(), norm(change), message)


def test_inner_value_that_is_an_output_stays_computed():
    model = norm(("=> (float16[n, 8] y)", "=> (float16[n, 8] y, float[n, 1] mean)"))
    before = run(model, x=X)
    RaiseOpset().run(model)
    FuseRmsNorm().run(model)
    after = run(model, x=X)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, rtol=ONE_ROUNDING)


def test_norm_of_a_norm_reads_what_the_first_gives_now():
    body = NORM[NORM.index("    wide") : NORM.rindex("}")]
    own = "wide|square|mean|shifted|root|inverse|scaled|narrow|y"
    second = re.sub(rf"\b({own})\b", r"\g<1>2", body).replace("(x)", "(y)")
    text = NORM.replace(body, body + second).replace("8] y)", "8] y2)")
    before = run(parse(text, weight=WEIGHT), x=X)[0]
    model = parse(text, weight=WEIGHT)
    RaiseOpset().run(model)
    FuseRmsNorm().run(model)
    assert kinds(model) == ["RMSNormalization"] * 2
    np.testing.assert_allclose(run(model, x=X)[0], before, rtol=2 * ONE_ROUNDING)
