from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.graph.passes.insert_gap_remap import DOMAIN, InsertGapRemap, gap_remap_function
from gap_export.spec.positions import (
    VisualSpan,
    build_kept_positions,
    compact_positions,
    gap_remap,
    stack_tables,
)
from tests.graph.lowering_models import check_declined

SLOTS = np.array([[0, 1, 2, 3, 9], [5, 6, 7, 8, 2]])
MASK = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
TABLE = np.array([[0, 4, 6], [0, 1, 2]])


def test_match_rewires_every_consumer(small_decoder):
    model = small_decoder()
    assert InsertGapRemap().run(model)
    node = next(iter(model.graph))
    assert (node.domain, node.op_type) == (DOMAIN, "GapRemap")
    names = [value.name for value in model.graph.inputs]
    assert names == ["position_ids", "kept_positions", "attention_mask"]
    kept = model.graph.inputs[1]
    assert kept.dtype == ir.DataType.INT64
    assert [str(dim) for dim in kept.shape] == ["batch", "prompt_length"]
    assert [user.op_type for user, _ in model.graph.inputs[0].uses()] == ["GapRemap"]
    assert sorted(user.name for user, _ in node.outputs[0].uses()) == [
        "negative", "twice", "twice",
    ]  # fmt: skip
    assert model.opset_imports[DOMAIN] == 1
    assert list(model.functions) == [(DOMAIN, "GapRemap", "")]


def test_numerics_before_and_after(small_decoder, run_model):
    feeds = {"position_ids": SLOTS, "attention_mask": MASK}
    before = run_model(small_decoder(), **feeds)
    model = small_decoder()
    InsertGapRemap().run(model)
    identity = run_model(model, **feeds, kept_positions=np.stack([compact_positions(3)] * 2))
    for old, new in zip(before, identity, strict=True):
        assert np.array_equal(old, new)
    total, negative = run_model(model, **feeds, kept_positions=TABLE)
    ids = np.array([[0, 4, 6, 7, 13], [5, 6, 7, 8, 2]])
    assert np.array_equal(ids, gap_remap(SLOTS, TABLE))
    assert np.array_equal(total, 2 * ids + MASK)
    assert np.array_equal(negative, -ids)


def test_model_that_went_through_a_file_is_handled(small_decoder, run_model, tmp_path):
    ir.save(small_decoder(), tmp_path / "theirs.onnx")
    model = ir.load(tmp_path / "theirs.onnx")
    InsertGapRemap().run(model)
    negative = run_model(model, position_ids=SLOTS, attention_mask=MASK, kept_positions=TABLE)[1]
    assert np.array_equal(negative, -gap_remap(SLOTS, TABLE))


def test_consumer_in_a_subgraph_is_rewired(small_decoder, run_model):
    model = small_decoder()
    ids = model.graph.inputs[0]

    def branch(op_type: str) -> ir.Graph:
        node = ir.node(op_type, [ids])
        node.outputs[0].name = f"{op_type}_out"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        return ir.Graph([], node.outputs, nodes=[node], name=op_type)

    condition = ir.node("Constant", [], attributes={"value": ir.tensor([False])})
    choice = ir.node(
        "If",
        condition.outputs,
        attributes={"then_branch": branch("Neg"), "else_branch": branch("Identity")},
    )
    choice.outputs[0].name = "chosen"
    choice.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    condition.outputs[0].name = "condition"
    model.graph.extend([condition, choice])
    model.graph.outputs.append(choice.outputs[0])
    InsertGapRemap().run(model)
    chosen = run_model(model, position_ids=SLOTS, attention_mask=MASK, kept_positions=TABLE)[2]
    assert np.array_equal(chosen, gap_remap(SLOTS, TABLE))


def test_input_that_is_an_output_too_keeps_giving_out_slots(small_decoder, run_model):
    model = small_decoder()
    model.graph.outputs.append(model.graph.inputs[0])
    InsertGapRemap().run(model)
    outputs = run_model(model, position_ids=SLOTS, attention_mask=MASK, kept_positions=TABLE)
    assert np.array_equal(outputs[1], -gap_remap(SLOTS, TABLE))
    assert np.array_equal(outputs[2], SLOTS)


@pytest.mark.parametrize(
    ("changes", "mend", "said"),
    [
        ({"read": False}, lambda model: model.graph.outputs.append(model.graph.inputs[0]),
         "no node reads the input position_ids"),
        ({"name": "cache_position"}, None,
         "no input called position_ids: inputs cache_position, attention_mask; allowed: an int64 "
         "input position_ids of shape [batch, sequence]"),
        ({"shape": [4, "batch", "sequence"]}, None, "handles: INT64 [4,batch,sequence]"),
        ({"shape": ["axes", "batch", "sequence"]}, None, "handles: INT64 [axes,batch,sequence]"),
        ({"shape": ["sequence"]}, None, "not what the pass handles: INT64 [sequence]"),
        ({"dtype": ir.DataType.INT32}, None, "not what the pass handles: INT32"),
        ({"dtype": ir.DataType.FLOAT}, None, "not what the pass handles: FLOAT"),
        ({}, lambda model: setattr(model.graph.inputs[0], "shape", None), "unknown shape"),
        ({}, InsertGapRemap().run, "has a GapRemap node already"),
        ({}, lambda model: setattr(model.graph.inputs[1], "name", "kept_positions"),
         "a name the pass needs is taken: kept_positions"),
        ({"opset": 14}, None, "opset is too old for the node: 14"),
    ],
)  # fmt: skip
def test_what_the_pass_does_not_handle_is_refused_and_left(small_decoder, changes, mend, said):
    model = small_decoder(**changes)
    if mend is not None:
        mend(model)
    check_declined(InsertGapRemap(), model, re.escape(said))


@pytest.fixture(scope="module")
def remap():
    """The function alone, in ONNX Runtime."""
    import onnxruntime

    slots, kept = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B", length]))
        for name, length in (("position_ids", "S"), ("kept_positions", "P"))
    )
    node = ir.node("GapRemap", [slots, kept], domain=DOMAIN)
    node.outputs[0].name = "ids"
    node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    imports = {"": 20, DOMAIN: 1}
    graph = ir.Graph([slots, kept], node.outputs, nodes=[node], opset_imports=imports, name="g")
    model = ir.Model(graph, ir_version=10, functions=[gap_remap_function(opset=20)])
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(position_ids: np.ndarray, kept_positions: np.ndarray) -> np.ndarray:
        feed = {"position_ids": position_ids, "kept_positions": kept_positions}
        return np.asarray(session.run(None, feed)[0])

    return run


def slow_remap(slot: int, row: list[int]) -> int:
    """Walk there: through the table, then one id a slot."""
    position = row[0]
    for step in range(1, slot + 1):
        position = row[step] if step < len(row) else position + 1
    return position


@st.composite
def prompts(draw: st.DrawFn) -> np.ndarray:
    """Tables of a batch: each row text and up to three images of which some tokens survive."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        spans, cursor = [], draw(st.integers(0, 5))
        for _ in range(draw(st.integers(0, 3))):
            count = draw(st.integers(1, 12))
            keep = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))
            spans.append(
                VisualSpan(start=cursor, num_visual_tokens=count, keep_indices=np.array(keep))
            )
            cursor += count + draw(st.integers(0, 4))
        length = cursor + draw(st.integers(1, 6))
        rows.append(build_kept_positions(unpruned_length=length, spans=spans))
    return stack_tables(rows)


def test_ids_of_three_axes_give_a_table_of_three_and_take_slots_of_one(small_decoder, run_model):
    model = small_decoder(shape=[3, "batch", "sequence"])
    InsertGapRemap().run(model)
    shapes = [[str(dim) for dim in value.shape] for value in model.graph.inputs[:2]]
    assert shapes == [["batch", "sequence"], ["3", "batch", "prompt_length"]]
    table = np.stack([TABLE, TABLE + 1, TABLE * 2])
    negative = run_model(model, position_ids=SLOTS, attention_mask=MASK, kept_positions=table)[1]
    assert np.array_equal(negative, -gap_remap(SLOTS, table))


@settings(max_examples=150, deadline=None)
@given(table=prompts(), first=st.integers(0, 60), length=st.integers(1, 40))
def test_function_equals_positions_and_a_slow_walk(remap, table, first, length):
    slots = np.tile(np.arange(first, first + length), (table.shape[0], 1))
    found = remap(slots, table)
    assert np.array_equal(found, gap_remap(slots, table))
    slow = [[slow_remap(int(s), row) for s in slots[0]] for row in table.tolist()]
    assert found.tolist() == slow


@pytest.mark.parametrize("slot", [231, 232, 10**6, 2**40])
def test_decode_goes_on_from_the_unpruned_length(remap, slot):
    """LLaVA-1.5: 35 tokens before the image, 173 of 576 kept, 24 after it."""
    span = VisualSpan(start=35, num_visual_tokens=576, keep_indices=np.arange(0, 519, 3))
    table = build_kept_positions(unpruned_length=635, spans=[span])[None]
    assert table.shape == (1, 232)
    assert remap(np.array([[slot]]), table).tolist() == [[slot - 232 + 635]]
