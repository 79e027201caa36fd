from __future__ import annotations

import onnx_ir as ir
import pytest

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass, fingerprint
from gap_export.graph.pipelines import PIPELINES


def passing(apply):
    """A pass made of one function."""

    class Made(GraphPass):
        def apply(self, model: ir.Model) -> bool:
            return bool(apply(model))

    return Made()


def rename(model: ir.Model) -> bool:
    model.graph.name = "other"
    return True


def test_honest_passes_are_reported(small_decoder):
    model = small_decoder()
    assert passing(rename).run(model)
    assert not passing(lambda _: False).run(model)


def test_pass_that_claims_a_change_is_caught(small_decoder):
    with pytest.raises(PassError, match="modified=True and the graph is the same"):
        passing(lambda _: True).run(small_decoder())


def test_pass_that_hides_a_change_is_caught(small_decoder):
    with pytest.raises(PassError, match="modified=False and the graph changed"):
        passing(lambda model: not rename(model)).run(small_decoder())


def change_attribute(model: ir.Model) -> None:
    next(iter(model.graph)).attributes["axis"] = ir.AttrInt64("axis", 1)


def change_wiring(model: ir.Model) -> None:
    next(iter(model.graph)).replace_input_with(1, model.graph.inputs[1])


def change_initializer(model: ir.Model) -> None:
    value = ir.Value(name="w", const_value=ir.tensor([1.0], name="w"))
    model.graph.register_initializer(value)


@pytest.mark.parametrize(
    "change",
    [
        change_attribute,
        change_wiring,
        change_initializer,
        lambda m: m.graph.outputs.reverse(),
        lambda m: m.opset_imports.update({"x": 1}),
        lambda m: m.graph.inputs[0].metadata_props.update(a="b"),
        lambda m: setattr(m.graph.inputs[0], "shape", ir.Shape([1, 2])),
        lambda m: setattr(next(iter(m.graph)), "op_type", "Sub"),
    ],
)
def test_fingerprint_sees_every_kind_of_change(small_decoder, change):
    model = small_decoder()
    before = fingerprint(model)
    assert fingerprint(small_decoder()) == before
    change(model)
    assert fingerprint(model) != before


def test_fingerprint_sees_an_initializers_value(small_decoder):
    prints = set()
    for number in (1.0, 2.0):
        model = small_decoder()
        value = ir.Value(name="w", const_value=ir.tensor([number], name="w"))
        model.graph.register_initializer(value)
        prints.add(fingerprint(model))
    assert len(prints) == 2


def test_every_component_has_a_pipeline_and_only_the_decoder_gets_the_node():
    names = {name: [type(p).__name__ for p in passes] for name, passes in PIPELINES.items()}
    assert set(names) == {
        "vision_encoder",
        "token_pruner",
        "text_encoder",
        "embed_tokens",
        "decoder_model_merged",
    }
    assert [n for n, passes in names.items() if "InsertGapRemap" in passes] == [
        "decoder_model_merged"
    ]
