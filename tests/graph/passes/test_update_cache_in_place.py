from __future__ import annotations

import numpy as np
import pytest

from gap_export.errors import PassError
from gap_export.graph.passes.raise_opset import RaiseOpset
from gap_export.graph.passes.update_cache_in_place import UpdateCacheInPlace
from tests.graph.lowering_models import changed, check_declined, kinds, parse, run

CAPACITY = 12

CACHE = """
decoder (float16[b, 2, s, 4] new, int64[b, t] attention_mask, int64[b, s] position_ids,
         float16[b, 2, p, 4] past_key_values.0.key)
    => (float16[b, 2, t, 4] present.0.key, float16[b, 2, t, 4] doubled, int64[1] past_length,
        int64[1] rows) {
    past_length = Shape <start = 2, end = 3> (past_key_values.0.key)
    rows = Shape <start = 0, end = 1> (past_key_values.0.key)
    present.0.key = Concat <axis = 2> (past_key_values.0.key, new)
    doubled = Add (present.0.key, present.0.key)
}"""


def decoder(*changes: tuple[str, str]):
    text = changed(CACHE, *changes)
    # ONNX's text form has no dots in names.
    dotted = {"past_key_values.0.key": "past", "present.0.key": "present"}
    for name, plain in dotted.items():
        text = text.replace(name, plain)
    model = parse(text)
    back = {plain: name for name, plain in dotted.items()}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = back.get(value.name, value.name)
    return model


def step(past: np.ndarray, num_new: int, total: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(total)
    return {
        "new": rng.standard_normal((2, 2, num_new, 4)).astype(np.float16),
        "attention_mask": np.ones((2, total), np.int64),
        "position_ids": np.zeros((2, num_new), np.int64),
        "past_key_values.0.key": past,
    }


def test_cache_is_written_where_the_past_ends():
    growing, fixed = decoder(), decoder()
    RaiseOpset().run(fixed)
    assert UpdateCacheInPlace(capacity=CAPACITY).run(fixed)
    assert kinds(fixed).count("TensorScatter") == 1 and "Concat" not in kinds(fixed)
    assert list(fixed.graph.inputs[3].shape)[2] == CAPACITY
    assert list(fixed.graph.outputs[0].shape)[2] == CAPACITY
    past = np.zeros((2, 2, 0, 4), np.float16)
    # What is beyond the slots in use must not matter.
    buffer = np.full((2, 2, CAPACITY, 4), np.nan, np.float16)
    for num_new, total in ((5, 5), (1, 6), (3, 9), (3, 12)):
        truth = run(growing, **step(past, num_new, total))
        found = run(fixed, **step(buffer, num_new, total))
        np.testing.assert_array_equal(found[0][:, :, :total], truth[0])
        assert np.isnan(found[0][:, :, total:]).all()
        for old, new in zip(truth[1:], found[1:], strict=True):
            np.testing.assert_array_equal(new, old)
        past, buffer = truth[0], found[0]
    assert not UpdateCacheInPlace(capacity=CAPACITY).run(fixed)


def test_graph_without_cache_stays():
    model = decoder()
    model.graph.inputs[3].name = "memory"
    assert not UpdateCacheInPlace(capacity=CAPACITY).run(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("start = 2, end = 3", "start = 1, end = 3"), ("int64[1] past_l", "int64[2] past_l")],
         "is read along with other sizes: Shape Shape_0 1:3; allowed: Shape 2:3"),
        ([("doubled = Add (present.0.key, present.0.key)",
           "doubled = Concat <axis = 2> (past_key_values.0.key, new)")],
         "is not extended once: 2 Concat"),
        ([("doubled = Add (present.0.key, present.0.key)",
           "other = Neg (past_key_values.0.key)\n"
           "    doubled = Add (present.0.key, present.0.key)")],
         "read otherwise than to extend and measure it: Neg"),
        ([("(past_key_values.0.key, new)", "(new, past_key_values.0.key)")],
         "is not extended by what is new behind it"),
        ([("Concat <axis = 2>", "Concat <axis = 1>")], "is not extended by what is new behind it"),
        ([("attention_mask", "mask")], "no int64 input attention_mask of two axes"),
        ([("int64[b, s] position_ids", "int64[3, b, s] position_ids")],
         "no int64 input position_ids of two axes"),
    ],
)  # fmt: skip
def test_near_miss_is_refused_and_left(changes, message):
    check_declined(UpdateCacheInPlace(capacity=CAPACITY), decoder(*changes), message)


def test_no_capacity_is_refused():
    with pytest.raises(PassError, match="a cache has slots: 0"):
        UpdateCacheInPlace(capacity=0)
