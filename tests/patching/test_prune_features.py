"""The passes that prune a vision encoder."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper

from gap_export.errors import PassError
from gap_export.patching.prune_by_score import PruneByAttention, PruneByCls
from gap_export.patching.prune_features import PruneAtPlaces
from tests.patching.graphs import FLOAT, constant, model, to_ir, value

PLACES = np.array([0, 2], dtype=np.int64)
FOUR = PruneAtPlaces(PLACES, num_visual_tokens=4)
BY_ATTENTION = PruneByAttention(num_kept_tokens=2, num_visual_tokens=4)
BY_CLS = PruneByCls(num_kept_tokens=2, num_visual_tokens=4)


CONSTANTS = [
    constant("one", [1]), constant("zero", [0]), constant("four", [4]),
    constant("end", [2**63 - 1]), constant("rest", np.arange(1, 5)),
    constant("w", np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)),
]  # fmt: skip


def of_nodes(nodes, constants, features="image_features", tokens=4, width=2, opset=18) -> ir.Model:
    pixels = value("pixel_values", FLOAT, ["images", 5, 3])
    outputs = [value(features, FLOAT, ["images", tokens, width])]
    return to_ir(model(nodes, [pixels], outputs, constants, opset=opset))


def encoder(*, drop="Slice", tokens=4, opset=17, features="image_features", extra=()) -> ir.Model:
    """``pixel_values`` [I, 5, 3] stand for hidden states with CLS first; a projector to 2."""
    make = helper.make_node
    drops = {
        "Slice": make("Slice", ["pixel_values", "one", "end", "one"], ["patches"], name="drop"),
        "Gather": make("Gather", ["pixel_values", "rest"], ["patches"], name="drop", axis=1),
        "last": make("Slice", ["pixel_values", "zero", "four", "one"], ["patches"], name="drop"),
    }
    nodes = [drops[drop], make("MatMul", ["patches", "w"], [features], name="project"), *extra]
    return of_nodes(nodes, CONSTANTS, features, tokens, opset=opset)


def run(made: ir.Model, pixels: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(made).SerializeToString())
    return session.run(None, {"pixel_values": pixels})


def hidden(images=2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((images, 5, 3)).astype(np.float32)


def refusal(made: ir.Model, pruner=FOUR) -> str:
    with pytest.raises(PassError) as caught:
        pruner.run(made)
    return str(caught.value)


def test_fixed_places_are_gathered_bit_for_bit():
    before = run(encoder(), hidden())[0]
    made = encoder()
    assert FOUR.run(made)
    features, keep = run(made, hidden())
    assert np.array_equal(features, before[:, PLACES])
    assert np.array_equal(keep, [PLACES, PLACES])
    assert keep.dtype == np.int64
    outputs = {value.name: str(value.shape) for value in made.graph.outputs}
    assert outputs == {"image_features": "[images,2,2]", "keep_indices": "[images,2]"}


@pytest.mark.parametrize("drop", ["Slice", "Gather"])
def test_cls_keeps_the_patches_most_like_cls(drop):
    made = encoder(drop=drop)
    BY_CLS.run(made)
    states = hidden(images=20)
    features, keep = run(made, states)
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    scores = np.einsum("ind,id->in", unit[:, 1:], unit[:, 0])
    wanted = np.sort(np.argsort(-scores, axis=1)[:, :2], axis=1)
    assert np.array_equal(keep, wanted)
    before = run(encoder(drop=drop), states)[0]
    assert np.array_equal(features, np.take_along_axis(before, wanted[:, :, None], axis=1))


def test_of_equally_good_patches_the_first_are_kept():
    states = np.ones((1, 5, 3), dtype=np.float32)
    made = encoder()
    BY_CLS.run(made)
    assert run(made, states)[1].tolist() == [[0, 1]]
    # Nothing at all is like nothing, not NaN.
    states[0, 1:3] = 0
    assert run(made, states)[1].tolist() == [[2, 3]]


def attending(*, joined: bool) -> ir.Model:
    """States attend to each other; ``joined``: images and heads on one axis."""
    make = helper.make_node
    split = [-1, 5, 3] if joined else [0, 1, 5, 3]
    turned = [0, 2, 1] if joined else [0, 1, 3, 2]
    nodes = [
        make("Reshape", ["pixel_values", "split"], ["q"]),
        make("Transpose", ["q"], ["k"], perm=turned),
        make("MatMul", ["q", "k"], ["logits"]),
        make("Softmax", ["logits"], ["weights"], name="attention"),
        make("MatMul", ["weights", "q"], ["mixed"]),
        make("Reshape", ["mixed", "whole"], ["states"]),
        make("Slice", ["states", "one", "end", "one"], ["patches"], name="drop"),
        make("MatMul", ["patches", "w"], ["image_features"]),
    ]
    return of_nodes(nodes, [*CONSTANTS, constant("split", split), constant("whole", [0, 5, 3])])


@pytest.mark.parametrize("joined", [False, True])
def test_fastervlm_keeps_what_cls_attends_to(joined):
    made = attending(joined=joined)
    BY_ATTENTION.run(made)
    states = hidden(images=20)
    keep = run(made, states)[1]
    # Softmax keeps the order of what goes into it.
    scores = np.einsum("ind,id->in", states[:, 1:], states[:, 0])
    assert np.array_equal(keep, np.sort(np.argsort(-scores, axis=1)[:, :2], axis=1))


def test_an_encoder_without_attention_weights_is_refused():
    message = refusal(encoder(), BY_ATTENTION)
    assert "does not show what CLS attends to: no attention" in message
    assert "a Softmax over the last of [.., 5, 5]" in message


def test_attention_over_something_else_is_refused():
    made = attending(joined=True)
    next(node for node in made.graph if node.name == "attention").attributes["axis"] = ir.AttrInt64(
        "axis", 1
    )
    assert "axis 1" in refusal(made, BY_ATTENTION)


def test_keeping_everything_changes_nothing():
    made = encoder()
    PruneByCls(num_kept_tokens=4, num_visual_tokens=4).run(made)
    features, keep = run(made, hidden())
    assert np.array_equal(features, run(encoder(), hidden())[0])
    assert np.array_equal(keep, [range(4)] * 2)


def test_an_encoder_that_never_had_cls_is_refused():
    message = refusal(encoder(drop="last"), BY_CLS)
    assert "it is not clear where the CLS token is dropped: no such node" in message
    assert "one Slice from 1 to the end, or one Gather of 1..N" in message


def test_two_layers_of_features_are_refused():
    """Some models join the states of several layers: there are two CLS tokens then."""
    make = helper.make_node
    nodes = [
        make("Slice", ["pixel_values", "one", "end", "one"], ["a"], name="first"),
        make("Neg", ["pixel_values"], ["other"]),
        make("Slice", ["other", "one", "end", "one"], ["b"], name="second"),
        make("Add", ["a", "b"], ["image_features"]),
    ]
    message = refusal(of_nodes(nodes, CONSTANTS[::3], width=3), BY_CLS)
    assert "Slice first" in message and "Slice second" in message


def test_a_way_around_the_drop_is_refused():
    extra = [
        helper.make_node("Softmax", ["pixel_values"], ["mixed"], name="mixing"),
        helper.make_node("ReduceMean", ["mixed"], ["mean"], keepdims=1),
        helper.make_node("Add", ["projected", "mean"], ["image_features"], name="joined"),
    ]
    made = encoder(features="projected", extra=extra)
    made.graph.outputs[0] = next(n for n in made.graph if n.name == "joined").outputs[0]
    made.graph.outputs[0].shape = ir.Shape(["images", 4, 2])
    made.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert "no CLS token is dropped on every way" in refusal(made, BY_CLS)


@pytest.mark.parametrize(
    ("changes", "mend", "message"),
    [
        ({"tokens": 3}, None, "is not of the shape that is pruned: [images,3,2]"),
        ({"features": "last_hidden_state"}, None, "are not what is known: last_hidden_state"),
        ({"opset": 12}, None, "opset is too old for pruning: 12"),
        ({}, lambda graph: setattr(graph.inputs[0], "name", "pixels"), "not fed: pixels"),
        ({}, lambda graph: setattr(graph.outputs[0], "shape", ir.Shape(["all", 2])), "[all,2]"),
        ({}, lambda graph: setattr(graph.node("project").inputs[0], "name", "keep_indices"),
         "a name the pass needs is taken"),
        ({}, lambda graph: FOUR.run(ir.Model(graph, ir_version=8)),
         "pruned already: output keep_indices"),
    ],
)  # fmt: skip
def test_another_interface_is_refused(changes, mend, message):
    made = encoder(**changes)
    if mend is not None:
        mend(made.graph)
    assert message in refusal(made)
