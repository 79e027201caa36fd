"""Walks a parsed network from ``position_ids`` to the rotary maths, by what its layers do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What a layer does, where its type says only half of it: the class to see it as, the attribute.
_OPERATIONS = {
    "ELEMENTWISE": ("IElementWiseLayer", "op"),
    "UNARY": ("IUnaryLayer", "op"),
    "GATHER": ("IGatherLayer", "mode"),
    "REDUCE": ("IReduceLayer", "op"),
    "ACTIVATION": ("IActivationLayer", "type"),
    "TOPK": ("ITopKLayer", "op"),
}


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One layer: its type as TensorRT calls it, and its operation where that leaves it open."""

    name: str
    type: str
    operation: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class NetworkView:
    """A network's layers in the order they were parsed, which is one they can run in."""

    layers: tuple[LayerView, ...]

    def consumers(self, tensor: str) -> Iterator[LayerView]:
        return (layer for layer in self.layers if tensor in layer.inputs)

    def downstream(self, tensor: str) -> Iterator[LayerView]:
        """Every layer that what is in a tensor reaches, in order."""
        reached = {tensor}
        for layer in self.layers:
            if reached & set(layer.inputs):
                reached |= set(layer.outputs)
                yield layer


def view_network(module: Any, network: Any) -> NetworkView:
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return NetworkView(tuple(_layer(module, layer) for layer in layers))


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
    network has not got them so. With several position axes slots are repeated on each.
    """
    slots = "position_ids"
    (least,) = _only(view, slots, "ELEMENTWISE", "MIN")
    (within,) = least.outputs
    (gather,) = _only(view, within, "GATHER", "ELEMENT")
    table, places = gather.inputs
    assert table == "kept_positions" and places in _in_any_shape(view, within)
    (beyond,) = _only(view, slots, "ELEMENTWISE", "SUB")
    assert beyond.inputs == (slots, within)
    (add,) = _only(view, gather.outputs[0], "ELEMENTWISE", "SUM")
    first, second = add.inputs
    assert first == gather.outputs[0] and second in _in_any_shape(view, beyond.outputs[0])
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
        tuple(
            layer
            for layer in view.layers
            if remapped not in layer.outputs and layer.type != "SHAPE"
        ),
    )
    around = list(cut.downstream("position_ids"))
    assert not any(layer in around for layer in rotary)


def _only(view: NetworkView, tensor: str, kind: str, operation: str) -> list[LayerView]:
    known = _in_any_shape(view, tensor)
    return [
        layer
        for layer in view.layers
        if (layer.type, layer.operation) == (kind, operation) and known & set(layer.inputs)
    ]


def _in_any_shape(view: NetworkView, tensor: str) -> set[str]:
    """A tensor, and the same with more axes or repeated along them."""
    found = {tensor}
    for layer in view.layers:
        if layer.type in {"SHUFFLE", "SLICE"} and layer.inputs[0] in found:
            found |= set(layer.outputs)
    return found


def _layer(module: Any, layer: Any) -> LayerView:
    kind = str(layer.type.name)
    inputs = (layer.get_input(i) for i in range(layer.num_inputs))
    return LayerView(
        name=layer.name,
        type=kind,
        operation=_operation(module, layer, kind),
        # An optional input that is not given is None.
        inputs=tuple(tensor.name for tensor in inputs if tensor is not None),
        outputs=tuple(layer.get_output(i).name for i in range(layer.num_outputs)),
    )


def _operation(module: Any, layer: Any, kind: str) -> str | None:
    if kind not in _OPERATIONS:
        return None
    class_name, attribute = _OPERATIONS[kind]
    # TensorRT's own way: a layer of a network is an ILayer until it is told what it is.
    layer.__class__ = getattr(module, class_name)
    return str(getattr(layer, attribute).name)
