"""A component with three layers of a stack, for tracing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from itertools import chain

from torch import nn

from gap_export.exporting.stamping.labels import CACHES, Labels, unlike
from gap_export.families.common.reference import Component
from gap_export.spec.manifest import TensorSpec

# Behind those that lead: the first, the stamp and the last.
NUM_TRACED = 3


def is_stampable(component: Component) -> bool:
    """Whether the component declares a stack of layers deep enough to gain anything."""
    most = NUM_TRACED + component.num_leading
    return component.repeated is not None and len(stack_of(component)) > most


def shorten(component: Component) -> Component:
    """The component with the first, the second and the last of its layers, and their caches.

    Those that lead stay in front of them.

    Args:
        component: A stampable one; it and its module stay as they are. Beside its layers the module
            must not depend on their number, which nothing here can see.

    Returns:
        One whose module shares every weight with the given one's. Its last layer has number 2, or
        more where others lead.

    Raises:
        ExportError: the layers between the first and the last, or their caches, are not all alike.
    """
    layers, start = stack_of(component), component.num_leading + 1
    assert component.repeated is not None
    middle = [_make(layer) for layer in layers[start:-1]]
    for index, make in enumerate(middle, start=start):
        if make != middle[0]:
            raise unlike("a layer is made differently", f"{component.repeated}.{index}")
    few = nn.ModuleList([*layers[: start + 1], layers[-1]])
    return dataclasses.replace(
        component,
        module=_with_child(component.module, component.repeated.split("."), few),
        inputs=_first_and_last(component.inputs, len(layers), start),
        outputs=_first_and_last(component.outputs, len(layers), start),
        repeated=None,
    )


def stack_of(component: Component) -> nn.ModuleList:
    """The component's list of layers."""
    assert component.repeated is not None
    stack = component.module.get_submodule(component.repeated)
    assert isinstance(stack, nn.ModuleList), f"{component.repeated} is no list of layers"
    return stack


def _make(layer: nn.Module) -> list[str]:
    """All that decides how a layer computes, but for the values of its weights."""
    described: list[str] = []
    for name, module in layer.named_modules():
        plain = sorted((k, repr(v)) for k, v in vars(module).items() if not k.startswith("_"))
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        tensors = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in own]
        described.append(f"{name} {type(module)} {plain} {tensors}")
    return described


def _with_child(module: nn.Module, path: Sequence[str], child: nn.Module) -> nn.Module:
    """The module with another submodule at the path; only what leads there is copied."""
    if not path:
        return child
    copied = copy.copy(module)
    # A shallow copy still shares the table of its children.
    children = dict(vars(module)["_modules"])
    children[path[0]] = _with_child(children[path[0]], path[1:], child)
    vars(copied)["_modules"] = children
    return copied


def _first_and_last(
    specs: Sequence[TensorSpec], num_layers: int, stamp: int
) -> tuple[TensorSpec, ...]:
    """The specs without the caches of the layers left out, behind the stamp and before the last."""
    labels = Labels(*CACHES)
    numbers = {layer: layer for layer in range(stamp + 1)} | {num_layers - 1: stamp + 1}
    kept: list[TensorSpec] = []
    caches: dict[tuple[str, str], list[TensorSpec]] = {}
    for spec in specs:
        parts = labels.split(spec.name)
        if parts is None:
            kept.append(spec)
            continue
        prefix, layer, part = parts
        cache = caches.setdefault((prefix, part), [])
        if layer != len(cache):
            raise unlike("caches are not declared layer by layer", spec.name)
        cache.append(spec)
        if layer in numbers:
            kept.append(dataclasses.replace(spec, name=f"{prefix}.{numbers[layer]}{part}"))
    for (prefix, part), cache in caches.items():
        if len(cache) != num_layers or len({(c.dtype, c.shape) for c in cache[stamp:-1]}) != 1:
            raise unlike("caches differ from layer to layer", f"{prefix}.*{part}")
    return tuple(kept)
