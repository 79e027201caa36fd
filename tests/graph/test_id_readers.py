"""Position ids may go to RoPE, and must not go anywhere else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from gap_export.errors import PassError
from gap_export.graph.id_readers import IdReader, find_position_reach
from gap_export.graph.onnx_file import OnnxFile
from tests.patching.graphs import (
    BOOL,
    FLOAT,
    HALF,
    INT64,
    MICROSOFT,
    angle_constants,
    angles,
    constant,
    decoder,
    value,
)  # fmt: skip

COS = value("cos", FLOAT, None)
SIN = value("sin", FLOAT, None)
make = helper.make_node


def reach_of(model):
    raw = ir.to_proto(model).SerializeToString()
    return find_position_reach(OnnxFile(raw, Path()), "position_ids")


def refusal(model) -> str:
    with pytest.raises(PassError) as caught:
        reach_of(model)
    return str(caught.value)


def test_cosine_and_sine_are_found():
    reach = reach_of(decoder(angles(), outputs=[COS, SIN], constants=angle_constants()))
    assert sorted(reach.rotary) == ["Cos cosine", "Sin sine"]
    assert reach.rounded == ()


def test_ids_rounded_to_sixteen_bits_are_noted():
    made = decoder(
        angles(dtype=HALF), outputs=[value("cos", HALF, None)],
        constants=angle_constants(np.float16),
    )  # fmt: skip
    assert reach_of(made).rounded == ("Cast to_float",)


def test_a_constant_table_is_found():
    table = constant("table", np.ones((16, 4), dtype=np.float32))
    nodes = [make("Gather", ["table", "position_ids"], ["cos"], name="look_up")]
    assert reach_of(decoder(nodes, outputs=[COS], constants=[table])).rotary == ("Gather look_up",)


def test_a_table_of_who_sees_whom_is_refused():
    table = constant("mask", np.tri(16, dtype=bool))
    nodes = [*angles(), make("Gather", ["mask", "position_ids"], ["seen"], name="rows")]
    made = decoder(
        nodes, outputs=[COS, value("seen", BOOL, None)], constants=[table, *angle_constants()]
    )
    assert "Gather rows reads position_ids" in refusal(made)


def test_a_table_that_the_graph_works_out_is_found():
    nodes = [
        make("Cos", ["steps"], ["table"], name="table"),
        make("Gather", ["table", "position_ids"], ["cos"], name="look_up"),
    ]
    made = decoder(nodes, outputs=[COS], constants=[constant("steps", np.ones((8, 2), np.float32))])
    assert reach_of(made).rotary == ("Gather look_up",)


def test_the_contributed_rotary_operator_is_found():
    node = make(
        "RotaryEmbedding", ["x", "position_ids", "table", "table"], ["y"], name="rope",
        domain=MICROSOFT,
    )  # fmt: skip
    table = constant("table", np.ones((16, 4), dtype=np.float32))
    made = decoder(
        [node], inputs=[value("x", FLOAT, ["batch", "sequence", 8])],
        outputs=[value("y", FLOAT, None)], constants=[table],
    )  # fmt: skip
    assert reach_of(made).rotary == ("RotaryEmbedding rope",)


@pytest.mark.parametrize("own_ids", [True, False])
def test_the_standard_rotary_operator_is_found(own_ids):
    table = constant("table", np.ones((16, 4), dtype=np.float32))
    nodes = (
        [make("RotaryEmbedding", ["x", "table", "table", "position_ids"], ["y"], name="rope")]
        if own_ids
        else [*angles(), make("RotaryEmbedding", ["x", "cos", "sin"], ["y"], name="rope")]
    )
    made = decoder(
        nodes, inputs=[value("x", FLOAT, ["batch", 2, "sequence", 8])],
        outputs=[value("y", FLOAT, None)], constants=[table, *angle_constants()], opset=23,
    )  # fmt: skip
    wanted = {"RotaryEmbedding rope"} if own_ids else {"Sin sine", "Cos cosine"}
    assert set(reach_of(made).rotary) == wanted


def test_shapes_of_ids_are_no_ids():
    nodes = [*angles(), make("Shape", ["position_ids"], ["sizes"], name="sizes")]
    made = decoder(
        nodes, outputs=[COS, SIN, value("sizes", INT64, [2])], constants=angle_constants()
    )
    assert len(reach_of(made).rotary) == 2


def test_a_causal_mask_made_of_ids_is_refused():
    """A kept token's id is larger than its slot: the mask would show it the future."""
    mask = make("GreaterOrEqual", ["position_ids", "slots"], ["mask"], name="causal")
    made = decoder(
        [*angles(), mask], inputs=[value("slots", INT64, ["batch", "sequence"])],
        outputs=[COS, value("mask", BOOL, None)], constants=angle_constants(),
    )  # fmt: skip
    message = refusal(made)
    assert "do not go to the rotary embedding alone: GreaterOrEqual causal" in message


def test_frequencies_that_depend_on_the_largest_id_are_refused():
    nodes = [*angles(), make("ReduceMax", ["position_ids"], ["longest"], name="longest")]
    made = decoder(nodes, outputs=[COS, value("longest", INT64, None)], constants=angle_constants())
    assert "ReduceMax longest reads position_ids" in refusal(made)


def test_an_offset_that_is_sliced_from_the_ids_is_refused():
    """Whoever takes the first id and counts on from there ignores all others."""
    nodes = [
        make("Slice", ["position_ids", "zero", "one", "one"], ["first"], name="first"),
        make("Cast", ["first"], ["wide"], to=FLOAT),
        make("Cos", ["wide"], ["cos"]),
    ]
    made = decoder(nodes, outputs=[COS], constants=[constant("zero", [0]), constant("one", [1])])
    assert "Slice first reads position_ids" in refusal(made)


def test_a_slice_of_everything_is_none():
    nodes = [
        make("Slice", ["position_ids", "zero", "end", "one"], ["all"], name="all"),
        make("Cast", ["all"], ["wide"], to=FLOAT),
        make("Cos", ["wide"], ["cos"], name="cosine"),
    ]
    numbers = [constant("zero", [0]), constant("one", [1]), constant("end", [2**63 - 1])]
    assert reach_of(decoder(nodes, outputs=[COS], constants=numbers)).rotary == ("Cos cosine",)


def test_ids_that_rotate_nothing_are_refused():
    nodes = [make("Identity", ["position_ids"], ["same"], name="same")]
    message = refusal(decoder(nodes, outputs=[value("same", INT64, None)]))
    assert "do not reach a rotary embedding: position_ids is read by Identity same" in message
    assert "allowed: Cos and Sin, RotaryEmbedding, or a Gather from a constant table" in message


def test_ids_that_are_not_read_are_refused():
    nodes = [make("Identity", ["x"], ["y"])]
    made = decoder(nodes, inputs=[value("x", FLOAT, [1])], outputs=[value("y", FLOAT, [1])])
    assert "position_ids is read by no node" in refusal(made)


def test_attention_that_rotates_by_itself_is_refused():
    node = make(
        "GroupQueryAttention", ["x", "", "", "", "", "length", "length", "t", "t", "position_ids"],
        ["y"], name="attention", domain=MICROSOFT, num_heads=2, kv_num_heads=2, do_rotary=1,
    )  # fmt: skip
    made = decoder(
        [*angles(), node],
        inputs=[value("x", FLOAT, [1, 1, 8]), value("length", INT64, [1])],
        outputs=[COS, value("y", FLOAT, None)],
        constants=[*angle_constants(), constant("t", np.ones((4, 4), np.float32))],
    )
    message = refusal(made)
    assert "rotates by itself (do_rotary) and counts slots" in message
    assert "GroupQueryAttention attention" in message


def test_a_part_of_rope_that_reads_something_else_is_refused():
    nodes = [
        *angles(),
        make("CumSum", ["attention_mask", "axis"], ["counted"], name="counted"),
        make("Cast", ["counted"], ["counted_wide"], to=FLOAT),
        make("Cos", ["counted_wide"], ["other"], name="other_cosine"),
    ]
    made = decoder(
        nodes, inputs=[value("attention_mask", INT64, ["batch", "total"])],
        outputs=[COS, SIN, value("other", FLOAT, None)],
        constants=[*angle_constants(), constant("axis", np.array(1))],
    )  # fmt: skip
    message = refusal(made)
    assert "a part of the rotary embedding does not come from position_ids: Cos other" in message


def test_ids_read_inside_a_branch_are_followed():
    branch = helper.make_graph(
        [
            make("Cast", ["position_ids"], ["wide"], to=FLOAT),
            make("Cos", ["wide"], ["inner"], name="inner_cosine"),
        ],
        "branch", [], [value("inner", FLOAT, None)],
    )  # fmt: skip
    compare = helper.make_graph(
        [make("Less", ["position_ids", "limit"], ["inner"], name="inner_less")],
        "compare", [], [value("inner", BOOL, None)],
    )  # fmt: skip
    for graph, found in ((branch, "Cos inner_cosine"), (compare, None)):
        node = make("If", ["flag"], ["out"], name="choice", then_branch=graph, else_branch=graph)
        made = decoder(
            [node], inputs=[value("flag", BOOL, []), value("limit", INT64, [])],
            outputs=[value("out", FLOAT if found else BOOL, None)],
        )  # fmt: skip
        if found:
            assert set(reach_of(made).rotary) == {found}
        else:
            assert "Less inner_less reads position_ids" in refusal(made)


def test_a_call_of_a_function_is_refused_by_name():
    node = make("Rotate", ["position_ids"], ["cos"], name="call", domain="somebody")
    proto = onnx.helper.make_model(
        helper.make_graph(
            [node], "made", [value("position_ids", INT64, ["batch", "sequence"])], [COS]
        )
    )
    from tests.patching.graphs import to_ir

    assert "Rotate call reads position_ids" in refusal(to_ir(proto))


def table(ids, width=8, dtype=np.float16):
    """Cosines and sines [R, d / 2] as FuseRotary makes them, of the ids that rows stand for."""
    frequencies = 1e4 ** -(np.arange(0, width, 2) / width)
    turns = np.asarray(ids, np.float32)[:, None] * frequencies[None].astype(np.float32)
    return np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_table_tells_which_id_each_row_stands_for(dtype):
    """As many rows as any model here has, of wide heads."""
    cos, sin = table(np.arange(32768), width=128, dtype=dtype)
    reader = IdReader(name="x", ids_name="ids", tables=("cos", "sin"))
    ids = partial(reader.ids, shape=(1, 3))
    values = {"cos": cos, "sin": sin}
    given = np.array([[0, 2049, 32767]])
    np.testing.assert_array_equal(ids({**values, "ids": given}), given)
    # One row of two turned round: each stands for the other.
    swapped = {name: rows.copy() for name, rows in values.items()}
    for rows in swapped.values():
        rows[[2048, 2049]] = rows[[2049, 2048]]
    np.testing.assert_array_equal(ids({**swapped, "ids": given}), [[0, 2048, 32767]])
    assert "reads row 32768 of a table of 32768" in ids({**values, "ids": given + 1})


def test_ids_of_another_number_are_told_from_shared_ones():
    reader = IdReader(name="Cos c", ids_name="ids")
    shared = reader.ids({"ids": np.array([[[3], [5]]])}, (2, 2))
    np.testing.assert_array_equal(shared, [[3, 5], [3, 5]])
    assert reader.ids({"ids": np.zeros((2, 3))}, (2, 2)) == (
        "Cos c reads [2, 3] ids instead of [2, 2]"
    )
