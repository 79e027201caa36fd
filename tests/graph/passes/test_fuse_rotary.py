from __future__ import annotations

import numpy as np
import pytest

from gap_export.errors import PassError
from gap_export.graph.passes.fuse_rotary import FuseRotary
from gap_export.graph.passes.raise_opset import RaiseOpset
from tests.graph.lowering_models import changed, check_declined, kinds, parse, run

RNG = np.random.default_rng(0)
FREQUENCIES = (1.0 / 10000 ** (np.arange(0, 8, 2) / 8)).astype(np.float32)
ROWS = 40000

MISSED = "places resemble the pattern and do not match it: (Cos|Sin) .*; use the portable"

ROTARY = """
rotary (float16[b, 2, s, 8] x, int64[b, s] ids, float[4] inv_freq) => (float16[b, 2, s, 8] y) {
    one = Constant <value = int64[1] {1}> ()
    three = Constant <value = int64[1] {3}> ()
    zero = Constant <value = int64[1] {0}> ()
    four = Constant <value = int64[1] {4}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    numbers = Cast <to = 1> (ids)
    row = Unsqueeze (numbers, one)
    column = Unsqueeze (row, three)
    half = Mul (column, inv_freq)
    angles = Concat <axis = -1> (half, half)
    cos = Cos (angles)
    cos16 = Cast <to = 10> (cos)
    sin = Sin (angles)
    sin16 = Cast <to = 10> (sin)
    first = Slice (x, zero, four, three, one)
    second = Slice (x, four, end, three, one)
    minus = Neg (second)
    turned = Concat <axis = -1> (minus, first)
    by_cos = Mul (x, cos16)
    by_sin = Mul (turned, sin16)
    y = Add (by_cos, by_sin)
}"""

# Of four frequencies two turn by the first of three ids.
MROPE = changed(
    ROTARY,
    ("int64[b, s] ids", "int64[3, b, s] ids"),
    ("one = ", "axes = Constant <value = int64[4] {0, 1, 2, 0}> ()\n    one = "),
    ("numbers = Cast <to = 1> (ids)", "chosen = Gather <axis = 0> (ids, axes)"),
    ("row = Unsqueeze (numbers, one)", "by_token = Transpose <perm = [1, 2, 0]> (chosen)"),
    (
        "column = Unsqueeze (row, three)",
        "numbers = Cast <to = 1> (by_token)\n    column = Unsqueeze (numbers, one)",
    ),
)


def rotary(*changes: tuple[str, str]):
    return parse(changed(ROTARY, *changes), inv_freq=FREQUENCIES)


def mrope(*changes: tuple[str, str]):
    return parse(changed(MROPE, *changes), inv_freq=FREQUENCIES)


def feeds(*ids: int):
    x = RNG.standard_normal((2, 2, len(ids), 8)).astype(np.float16)
    return {"x": x, "ids": np.array([ids, ids[::-1]])}


def test_rotation_becomes_one_node_with_the_same_result_for_ids_float16_cannot_hold():
    model = rotary()
    # From 2048 on float16 holds every second integer, from 32768 on every 32nd.
    given = feeds(0, 1, 2047, 2049, 4095, 32769, 39999)
    before = run(model, **given)[0]
    RaiseOpset().run(model)
    assert FuseRotary(max_position_embeddings=ROWS).run(model)
    assert kinds(model) == ["RotaryEmbedding"]
    (node,) = model.graph
    assert [value.name for value in node.inputs] == ["x", "rotary.cos", "rotary.sin", "ids"]
    after = run(model, **given)[0]
    # Tables and ONNX Runtime may differ in the last bit of a cosine.
    np.testing.assert_allclose(
        after.astype(np.float32), before.astype(np.float32), atol=2.0**-9, rtol=0
    )
    given["ids"] = given["ids"] - (given["ids"] == 32769)
    assert np.abs(run(model, **given)[0] - after).max() > 0.1


def test_tables_are_the_cosines_of_exact_ids():
    model = rotary()
    FuseRotary(max_position_embeddings=ROWS).run(model)
    cos = model.graph.initializers["rotary.cos"].const_value.numpy()
    assert (cos.dtype, cos.shape) == (np.float16, (ROWS, 4))
    assert not FuseRotary(max_position_embeddings=ROWS).run(model)
    truth = np.cos(np.arange(ROWS)[:, None] * FREQUENCIES.astype(np.float64))
    # float32 angles up to 40,000 are exact to 2**-9 of a turn's radian.
    assert np.abs(cos - truth).max() < 2.0**-8


def test_ids_of_three_axes_give_each_token_a_row_and_need_no_table():
    model = mrope()
    ids = RNG.integers(0, ROWS, (3, 2, 7))
    given = {**feeds(*range(7)), "ids": ids}
    before = run(model, **given)[0]
    RaiseOpset().run(model)
    assert FuseRotary(max_position_embeddings=16).run(model)
    # Worked out once from exact ids, in float32, and cast then.
    assert kinds(model)[-6:] == ["Mul", "Cos", "Cast", "Sin", "Cast", "RotaryEmbedding"]
    *_, node = model.graph
    assert [str(value.shape) for value in node.inputs] == ["[b,2,s,8]", "[b,s,4]", "[b,s,4]"]
    assert "rotary.cos" not in model.graph.initializers
    assert not FuseRotary(max_position_embeddings=16).run(model)
    after = run(model, **given)[0]
    np.testing.assert_allclose(
        after.astype(np.float32), before.astype(np.float32), atol=2.0**-9, rtol=0
    )
    for axis in range(3):
        # Each axis turns something.
        moved = ids + (np.arange(3) == axis)[:, None, None]
        assert np.abs(run(model, **{**given, "ids": moved})[0] - after).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("Transpose <perm = [1, 2, 0]>", "Transpose <perm = [2, 1, 0]>")], MISSED),
        ([("int64[4] {0, 1, 2, 0}", "int64[1] {0}")], "chosen in another way: .*0. on axis 0"),
        ([("Mul (turned, sin16)", "Mul (turned, cos16)")], MISSED),
        ([("float16[b, 2, s, 8] y)", "float16[b, 2, s, 8] y, float[b, 1, s, 4] cos0)"),
          ("cos = Cos", "cos0 = Cos (half)\n    cos = Cos")], MISSED),
        ([("float16[b, 2, s, 8] y)", "float16[b, 2, s, 8] y, float[b, 1, s, 8] cos)")], MISSED),
    ],
)  # fmt: skip
def test_near_miss_of_several_axes_is_refused(changes, message):
    model = mrope(*changes)
    with pytest.raises(PassError, match=message):
        FuseRotary(max_position_embeddings=16).run(model)


def test_graph_without_cosine_stays():
    model = rotary(("Cos (angles)", "Neg (angles)"), ("Sin (angles)", "Exp (angles)"))
    assert not FuseRotary(max_position_embeddings=16).run(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("Concat <axis = -1> (half, half)", "Concat <axis = -1> (half, column)")], MISSED),
        ([("float[4] inv_freq", "float[4] other, float[4] inv_freq"),
          ("Mul (column, inv_freq)", "Mul (column, other)")], "not a row of float32"),
        ([("Unsqueeze (row, three)", "Unsqueeze (row, one)")], MISSED),
        ([("Concat <axis = -1> (minus, first)", "Concat <axis = -1> (first, minus)")],
         MISSED),
        ([("Slice (x, zero, four, three, one)", "Slice (x, one, four, three, one)")],
         "turns other halves: .*(1, 4)"),
        ([("Slice (x, four, end, three, one)", "Slice (y0, four, end, three, one)"),
          ("first = ", "y0 = Exp (x)\n    first = ")], MISSED),
        ([("Add (by_cos, by_sin)", "Sub (by_cos, by_sin)")], MISSED),
        ([("Mul (turned, sin16)", "Mul (turned, cos16)")], MISSED),
    ],
)  # fmt: skip
def test_near_miss_is_refused_and_left(changes, message):
    check_declined(FuseRotary(max_position_embeddings=16), rotary(*changes), message)


def test_a_cosine_beside_the_rotation_is_refused():
    outputs = ("float16[b, 2, s, 8] y)", "float16[b, 2, s, 8] y, float[b, 1, s, 4] more)")
    model = rotary(outputs, ("cos16 = ", "more = Cos (half)\n    cos16 = "))
    with pytest.raises(PassError, match=MISSED):
        FuseRotary(max_position_embeddings=16).run(model)


def test_rotation_in_float32_is_refused():
    text = ROTARY.replace("float16", "float").replace("to = 10", "to = 1")
    with pytest.raises(PassError, match="not cast to 16-bit floats: FLOAT, FLOAT"):
        FuseRotary(max_position_embeddings=16).run(parse(text, inv_freq=FREQUENCIES))


def test_table_without_rows_is_refused():
    with pytest.raises(PassError, match="a row for each position: 0"):
        FuseRotary(max_position_embeddings=0)
