"""The passes of the form ``ort`` one by one, on graphs of a few nodes."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.graph.passes.fuse_group_query_attention import FuseGroupQueryAttention
from gap_export.graph.passes.fuse_simplified_norm import FuseSimplifiedNorm, FuseSkipNorm
from gap_export.graph.passes.rotate_by_rows import RotateByRows
from tests.graph.lowering_models import changed, check_declined, kinds, parse, run

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal(8).astype(np.float32)
X, Y = RNG.standard_normal((2, 5, 8)).astype(np.float32)

NORM = """
norm (float[n, 8] x, float[n, 8] y, float[8] weight) => (float[n, 8] z, float[n, 8] kept) {
    sum = Add (x, y)
    kept = Neg (sum)
    two = Constant <value = float {2.0}> ()
    axes = Constant <value = int64[1] {-1}> ()
    epsilon = Constant <value = float {0.001}> ()
    square = Pow (sum, two)
    mean = ReduceMean <keepdims = 1> (square, axes)
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    inverse = Reciprocal (root)
    scaled = Mul (sum, inverse)
    z = Mul (weight, scaled)
}"""


def test_a_norm_and_the_sum_before_it_become_one_node_that_gives_both():
    model = parse(NORM, weight=WEIGHT)
    before = run(model, x=X, y=Y)
    assert FuseSimplifiedNorm().run(model)
    assert not FuseSimplifiedNorm().run(model)
    assert FuseSkipNorm().run(model)
    assert not FuseSkipNorm().run(model)
    assert kinds(model) == ["SkipSimplifiedLayerNormalization", "Neg"]
    for old, new in zip(before, run(model, x=X, y=Y), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("int64[1] {-1}", "int64[1] {0}"), "the mean is not over the last axis"),
        (("float {2.0}", "float {3.0}"), "1 places resemble the pattern and do not match it"),
    ],
)
def test_another_norm_is_refused(change, message):
    check_declined(FuseSimplifiedNorm(), parse(changed(NORM, change), weight=WEIGHT), message)


def test_a_sum_that_repeats_a_row_stays():
    model = parse(changed(NORM, ("float[n, 8] y", "float[1, 8] y")), weight=WEIGHT)
    assert FuseSimplifiedNorm().run(model)
    assert not FuseSkipNorm().run(model)


ROTARY = """
rotary (float[b, 2, s, 8] whole, int64[b, s] ids, float[2] frequencies) => (float[b, 2, s, 8] y) {
    zero = Constant <value = int64[1] {0}> ()
    two = Constant <value = int64[1] {2}> ()
    four = Constant <value = int64[1] {4}> ()
    eight = Constant <value = int64[1] {8}> ()
    last = Constant <value = int64[1] {3}> ()
    first = Constant <value = int64[1] {1}> ()
    x = Slice (whole, zero, four, last)
    rest = Slice (whole, four, eight, last)
    wide = Cast <to = 1> (ids)
    row = Unsqueeze (wide, first)
    column = Unsqueeze (row, last)
    half = Mul (column, frequencies)
    angles = Concat <axis = -1> (half, half)
    cos = Cos (angles)
    sin = Sin (angles)
    low = Slice (x, zero, two, last)
    high = Slice (x, two, four, last)
    other = Neg (high)
    turned = Concat <axis = -1> (other, low)
    straight = Mul (x, cos)
    across = Mul (turned, sin)
    part = Add (straight, across)
    y = Concat <axis = -1> (part, rest)
}"""
HEADS = RNG.standard_normal((2, 2, 3, 8)).astype(np.float32)
# Ids beyond any table, and beyond what float16 holds.
IDS = np.array([[0, 1, 70001], [5, 3000, 3]])
FREQUENCIES = np.array([1.0, 0.01], np.float32)


def test_rotation_of_a_part_of_each_head_becomes_one_node_with_a_row_a_token():
    model = parse(ROTARY, frequencies=FREQUENCIES)
    (before,) = run(model, whole=HEADS, ids=IDS)
    assert RotateByRows().run(model)
    assert not RotateByRows().run(model)
    (node,) = (node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert node.inputs[0].name == "whole" and node.outputs[0].name == "y"
    assert node.attributes["rotary_embedding_dim"].as_int() == 4
    (after,) = run(model, whole=HEADS, ids=IDS)
    np.testing.assert_allclose(after, before, atol=1e-5)
    # Of other ids it is another result.
    (other,) = run(model, whole=HEADS, ids=np.tile(np.arange(3), (2, 1)))
    assert np.abs(other - before).max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("low = Slice (x, zero, two", "low = Slice (x, two, four"), "it turns other halves"),
        (("Cos (angles)", "Sin (angles)"), "resemble the pattern and do not match it"),
    ],
)
def test_another_rotation_is_refused(change, message):
    check_declined(RotateByRows(), parse(changed(ROTARY, change), frequencies=FREQUENCIES), message)


def test_attention_without_a_cache_is_refused():
    text = """
    attention (float[b, 2, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v, float[1, 1, s, s] m)
        => (float[n, 16] y) {
        scale = Constant <value = float {0.35}> ()
        size = Constant <value = int64[2] {-1, 16}> ()
        turned = Transpose <perm = [0, 1, 3, 2]> (k)
        product = MatMul (q, turned)
        scores = Mul (product, scale)
        masked = Add (scores, m)
        weights = Softmax <axis = -1> (masked)
        mixed = MatMul (weights, v)
        rows = Transpose <perm = [0, 2, 1, 3]> (mixed)
        y = Reshape (rows, size)
    }"""
    check_declined(FuseGroupQueryAttention(), parse(text), "masked in another way: m")
    # Without a mask it does not look like a decoder's; it must not be left in silence.
    bare = changed(text, ("masked = Add (scores, m)", "masked = Identity (scores)"))
    check_declined(FuseGroupQueryAttention(), parse(bare), "resemble the pattern")
