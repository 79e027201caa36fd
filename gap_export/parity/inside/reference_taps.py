"""What goes into and comes out of each module of the PyTorch reference, in a recorded call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import UsageError
from gap_export.exporting.torch_backend import to_numpy, to_torch
from gap_export.families import Component, Reference
from gap_export.parity.inside.taps import Arrays
from gap_export.parity.replay import NEW_CACHE, Call
from gap_export.spec.manifest import PruningSpec, QuantizationSpec
from gap_export.spec.recipe import Recipe

Side = Literal["input", "output"]
_PAST, _PRESENT = "past_key_values.", "present."


@dataclass(frozen=True, kw_only=True)
class ReferenceTaps:
    """A reference that lets itself be looked into.

    Attributes:
        reference: On the CPU, with its weights; its dtype is that of the graphs it is compared
            with.
        recipe: The model's.
        checkpoint: Its weights.
        pruning: The bundle's.
        quantization: The decoder's, where the reference computes with the bundle's INT4 weights.
        traced: Graphs of components that were exported anew, by name; tracing takes seconds.
    """

    reference: Reference
    recipe: Recipe
    checkpoint: Checkpoint
    pruning: PruningSpec
    quantization: QuantizationSpec | None = None
    traced: dict[str, bytes | None] = field(default_factory=dict, repr=False)

    def replay(self, component: str, call: Call, calls: Sequence[Call] = ()) -> ReferenceCall:
        """Prepare a call to be looked into.

        Args:
            component: The component it belongs to.
            call: The recorded call.
            calls: All calls of its question, in order; a decode step needs those before it, from
                which its cache is made once more.

        Raises:
            UsageError: a decode step without those before it.
        """
        part = self.reference.component(component)
        feed = dict(call.inputs)
        if call.is_decode:
            feed |= self._past(part, call, calls)
        return ReferenceCall(component=part, feed=feed)

    def _past(self, part: Component, call: Call, calls: Sequence[Call]) -> Arrays:
        """The cache before a call, by the graph's names."""
        embeds, mask = call.inputs["inputs_embeds"], call.inputs["attention_mask"]
        names = [spec.name for spec in part.inputs if spec.name.startswith(_PAST)]
        spec = self.reference.decoder_spec
        dtype = np.float32 if self.reference.dtype == "bfloat16" else self.reference.dtype
        shape = (len(embeds), spec.num_key_value_heads, 0, spec.head_dim)
        past: dict[str, NDArray[Any]] = {name: np.zeros(shape, dtype) for name in names}
        for before in _before(call, calls):
            outputs = ReferenceCall(component=part, feed={**before.inputs, **past}).outputs()
            past = {name: outputs[name.replace(_PAST, _PRESENT, 1)] for name in names}
        filled = past[names[0]].shape[2]
        wanted = mask.shape[1] - embeds.shape[1]
        if filled != wanted:
            raise UsageError(
                "a decode step cannot be looked into without the calls before it",
                seen=f"a cache of {filled} slots",
                allowed=f"{wanted}",
            )
        return past


@dataclass(frozen=True, kw_only=True)
class ReferenceCall:
    """One call of a component, which can be run as often as needed.

    Attributes:
        component: The reference's component.
        feed: The inputs of its graph, by name.
    """

    component: Component
    feed: Arrays
    _outputs: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def outputs(self) -> Arrays:
        """What it gives, by the graph's names."""
        if not self._outputs:
            self.modules(())
        return self._outputs

    def modules(self, names: Collection[str]) -> dict[tuple[str, Side], list[NDArray[Any]]]:
        """What some modules are given and give, each time they are run.

        Args:
            names: Dotted names of modules; empty for the component's own.

        Returns:
            For each module that is run, first inputs and outputs; other values than tensors are
            left out.
        """
        found: dict[tuple[str, Side], list[NDArray[Any]]] = {}
        module = self.component.module
        known = dict(module.named_modules())
        with ExitStack() as hooks, torch.inference_mode():
            for name in known.keys() & set(names):

                def keep(module: Any, args: Any, output: Any, name: str = name) -> None:
                    del module
                    values: dict[Side, Any] = {"input": args[0] if args else None, "output": output}
                    for side, value in values.items():
                        if isinstance(value, torch.Tensor):
                            # It must stay as it is, also where it is later changed in place.
                            found.setdefault((name, side), []).append(to_numpy(value).copy())

                hooks.callback(known[name].register_forward_hook(keep).remove)
            given = module(*to_torch(self.component, self.feed).values())
        tensors = [given] if isinstance(given, torch.Tensor) else list(given)
        for spec, tensor in zip(self.component.outputs, tensors, strict=True):
            self._outputs[spec.name] = to_numpy(tensor)
        return found


def _before(call: Call, calls: Sequence[Call]) -> list[Call]:
    """Decoder calls since the cache was new, without ``call``; none where it is not among them."""
    before: list[Call] = []
    for other in calls:
        if other is call:
            return before
        if other.component == NEW_CACHE:
            before = []
        elif other.is_decode:
            before.append(other)
    return []
