"""Walks a parsed network from ``position_ids`` to the rotary maths, by what its layers do."""

from __future__ import annotations

from gap_export.engines.inspect import LayerView, NetworkView


def rotary_layers(view: NetworkView) -> list[LayerView]:
    """Layers that turn ids into angles' cosines and sines, or do all of RoPE."""
    return [
        layer
        for layer in view.layers
        if layer.operation in {"COS", "SIN"} or layer.type == "ROTARY_EMBEDDING"
    ]


def gap_remap_output(view: NetworkView) -> str:
    """The tensor of remapped ids: kept[min(slot, last)] + (slot - min(slot, last)).

    Found from ``position_ids`` through Min, GatherElements, Sub and Add; AssertionError where the
    network has not got them so.
    """
    slots = "position_ids"
    (least,) = _only(view, slots, "ELEMENTWISE", "MIN")
    (within,) = least.outputs
    (gather,) = _only(view, within, "GATHER", "ELEMENT")
    assert gather.inputs == ("kept_positions", within)
    (beyond,) = _only(view, slots, "ELEMENTWISE", "SUB")
    assert beyond.inputs == (slots, within)
    (add,) = _only(view, gather.outputs[0], "ELEMENTWISE", "SUM")
    assert set(add.inputs) == {gather.outputs[0], beyond.outputs[0]}
    (remapped,) = add.outputs
    return remapped


def assert_rope_sees_remapped_ids(view: NetworkView) -> None:
    """The rotary maths depends on ``position_ids`` through the GAP remap, and in no other way."""
    remapped = gap_remap_output(view)
    rotary = rotary_layers(view)
    assert rotary
    reached = list(view.downstream(remapped))
    assert all(layer in reached for layer in rotary)
    # Without the remap's last layer nothing of the slots, but their number, gets there.
    cut = NetworkView(
        inputs=view.inputs,
        outputs=view.outputs,
        layers=tuple(
            layer
            for layer in view.layers
            if remapped not in layer.outputs and layer.type != "SHAPE"
        ),
    )
    around = list(cut.downstream("position_ids"))
    assert not any(layer in around for layer in rotary)


def _only(view: NetworkView, tensor: str, kind: str, operation: str) -> list[LayerView]:
    return [
        layer
        for layer in view.consumers(tensor)
        if (layer.type, layer.operation) == (kind, operation)
    ]
