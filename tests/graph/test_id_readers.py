"""Position ids may go to RoPE, and must not go anywhere else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from gap_export.errors import PassError
from gap_export.graph.id_readers import IdReader, PositionReach, find_position_reach
from gap_export.graph.onnx_file import OnnxFile
from tests.patching.graphs import (
    FLOAT,
    HALF,
    INT64,
    MICROSOFT,
    angle_constants,
    angles,
    constant,
    model,
    value,
)

make = helper.make_node
TABLE = constant("table", np.ones((16, 4), dtype=np.float32))
NUMBERS = [constant("zero", [0]), constant("one", [1]), constant("end", [2**63 - 1])]
COSINE = [
    make("Cast", ["of"], ["own_wide"], to=FLOAT),
    make("Cos", ["own_wide"], ["own_cos"], name="own"),
]


def reach_of(nodes, constants, *, opset=18) -> PositionReach:
    """Where ids [batch, sequence] go; what else nodes read is fed, by inputs that are not named."""
    ids = value("position_ids", INT64, ["batch", "sequence"])
    raw = model(nodes, [ids], [], constants, opset=opset).SerializeToString()
    return find_position_reach(OnnxFile(raw, Path()), "position_ids")


def branching(node):
    branch = helper.make_graph([node], "branch", [], [value("inner", FLOAT, None)])
    return make("If", ["flag"], ["out"], name="choice", then_branch=branch, else_branch=branch)


@pytest.mark.parametrize(
    ("nodes", "constants", "rotary"),
    [
        ([], [], []),
        # A constant table, and one that the graph works out.
        ([make("Gather", ["table", "position_ids"], ["c"], name="look_up")], [TABLE],
         ["Gather look_up"]),
        ([make("Cos", ["table"], ["made"]),
          make("Gather", ["made", "position_ids"], ["c"], name="look_up")], [TABLE],
         ["Gather look_up"]),
        ([make("RotaryEmbedding", ["x", "position_ids", "table", "table"], ["y"], name="rope",
               domain=MICROSOFT)], [TABLE], ["RotaryEmbedding rope"]),
        ([make("RotaryEmbedding", ["x", "table", "table", "position_ids"], ["y"], name="rope")],
         [TABLE], ["RotaryEmbedding rope"]),
        ([make("RotaryEmbedding", ["x", "cos", "sin"], ["y"], name="rope")], [], []),
        # Shapes of ids are no ids; a Slice of everything is none.
        ([make("Shape", ["position_ids"], ["sizes"])], [], []),
        ([make("Slice", ["position_ids", "zero", "end", "one"], ["of"]), *COSINE], NUMBERS,
         ["Cos own"]),
        ([branching(make("Cos", ["position_ids"], ["inner"], name="inner_cosine"))], [],
         ["Cos inner_cosine"]),
    ],
)  # fmt: skip
def test_what_turns_ids_into_angles_is_found(nodes, constants, rotary):
    given = [*angles(), *nodes], [*angle_constants(), *constants]
    assert set(reach_of(*given, opset=23).rotary) == {"Cos cosine", "Sin sine", *rotary}
    assert reach_of(*given).rounded == ()


def test_ids_rounded_to_sixteen_bits_are_noted():
    reach = reach_of(angles(dtype=HALF), angle_constants(np.float16))
    assert reach.rounded == ("Cast to_float",)


@pytest.mark.parametrize(
    ("nodes", "constants", "said"),
    [
        # A table of who sees whom.
        ([make("Gather", ["mask", "position_ids"], ["seen"], name="rows")],
         [constant("mask", np.tri(16, dtype=bool))], "Gather rows reads position_ids"),
        # A kept token's id is larger than its slot: the mask would show it the future.
        ([make("GreaterOrEqual", ["position_ids", "slots"], ["mask"], name="causal")], [],
         "do not go to the rotary embedding alone: GreaterOrEqual causal"),
        # Frequencies that depend on the largest id.
        ([make("ReduceMax", ["position_ids"], ["longest"], name="longest")], [],
         "ReduceMax longest reads position_ids"),
        # What takes the first id and counts on from there ignores all others.
        ([make("Slice", ["position_ids", "zero", "one", "one"], ["of"], name="first"), *COSINE],
         NUMBERS, "Slice first reads position_ids"),
        ([make("GroupQueryAttention", ["x", "", "", "", "", "n", "n", "t", "t", "position_ids"],
               ["y"], name="attention", domain=MICROSOFT, do_rotary=1)], [],
         "rotates by itself (do_rotary) and counts slots, so that no id can be kept: "
         "GroupQueryAttention attention"),
        ([make("CumSum", ["attention_mask", "zero"], ["of"]), *COSINE], NUMBERS,
         "a part of the rotary embedding does not come from position_ids: Cos own"),
        ([branching(make("Less", ["position_ids", "limit"], ["inner"], name="inner_less"))], [],
         "Less inner_less reads position_ids"),
        ([make("Rotate", ["position_ids"], ["y"], name="call", domain="somebody")], [],
         "Rotate call reads position_ids"),
    ],
)  # fmt: skip
def test_ids_that_go_elsewhere_and_angles_of_something_else_are_refused(nodes, constants, said):
    with pytest.raises(PassError) as caught:
        reach_of([*angles(), *nodes], [*angle_constants(), *constants])
    assert said in str(caught.value)
    assert "allowed: Cos and Sin, RotaryEmbedding, or a Gather from a const" in str(caught.value)


@pytest.mark.parametrize(("read", "seen"), [("position_ids", "Identity same"), ("x", "no node")])
def test_ids_that_rotate_nothing_are_refused(read, seen):
    with pytest.raises(PassError, match=f"a rotary embedding: position_ids is read by {seen}"):
        reach_of([make("Identity", [read], ["same"], name="same")], [])


def rows_of(ids, width=8, dtype=np.float16):
    """Cosines and sines [R, d / 2] as FuseRotary makes them, of the ids that rows stand for."""
    frequencies = 1e4 ** -(np.arange(0, width, 2) / width)
    turns = np.asarray(ids, np.float32)[:, None] * frequencies[None].astype(np.float32)
    return np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_table_tells_which_id_each_row_stands_for(dtype):
    """As many rows as any model here has, of wide heads."""
    cos, sin = rows_of(np.arange(32768), width=128, dtype=dtype)
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
