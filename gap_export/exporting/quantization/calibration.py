"""What goes into a decoder's linear layers, seen while it runs on calibration samples.

A decoder on the meta device runs, too: each module gets its weights when it is called and gives
them back after, so that no more than one of them is in memory. Computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gap_export.checkpoint.weights import Weight, cast
from gap_export.errors import UsageError
from gap_export.families import Component

# Rows of a layer's input that are kept to try roundings on, at most: 1.5 GB for all layers of a 7B
# model. Of 32 prompts of 200 tokens that is every 16th.
MAX_ROWS = 512


@dataclass(kw_only=True)
class Observed:
    """Inputs of one linear layer, [rows, K], over all samples.

    Attributes:
        total: float64 [K], the sum of the values' sizes.
        num_rows: Rows summed up.
        kept: Every ``stride``-th of the rows, float32 [r, K] each.
        stride: Doubled when that becomes too many.
    """

    total: torch.Tensor
    num_rows: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)
    stride: int = 1

    @property
    def mean_size(self) -> torch.Tensor:
        """Mean of |x| for every input channel, float32 [K]."""
        return (self.total / max(1, self.num_rows)).to(torch.float32)

    @property
    def rows(self) -> torch.Tensor:
        """The rows kept, float32 [at most MAX_ROWS, K], evenly from all samples."""
        return torch.cat(self.kept)

    def add(self, rows: torch.Tensor) -> None:
        """Count more rows, float32 [r, K]."""
        first = -self.num_rows % self.stride
        self.total += rows.abs().sum(dim=0, dtype=torch.float64)
        self.num_rows += len(rows)
        self.kept.append(rows[first :: self.stride].clone())
        while sum(map(len, self.kept)) > MAX_ROWS:
            self.kept = [torch.cat(self.kept)[::2].clone()]
            self.stride *= 2


def observe_inputs(
    component: Component,
    modules: Sequence[str],
    batches: Iterable[Sequence[torch.Tensor]],
) -> dict[str, Observed]:
    """Run a decoder and note what goes into some of its linear layers.

    Args:
        component: A decoder on the meta device or the CPU.
        modules: Dotted names of linear layers.
        batches: For each sample, or batch of samples, the component's inputs in order; floats of
            any dtype, key-value caches empty. Position ids are those that RoPE sees. What the
            attention mask hides is not counted.

    Returns:
        By the names given.

    Raises:
        CheckpointError: a weight cannot be read.
        UsageError: there is no sample.
    """
    places = {spec.name: index for index, spec in enumerate(component.inputs)}
    seen: dict[str, Observed] = {}
    shown = torch.ones(0, dtype=torch.bool)

    def watch(name: str) -> RemovableHandle:
        def note(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1])[shown]
            if name not in seen:
                total = torch.zeros(rows.shape[1], dtype=torch.float64)
                seen[name] = Observed(total=total)
            seen[name].add(rows)

        return component.module.get_submodule(name).register_forward_pre_hook(note)

    with ExitStack() as handles, torch.inference_mode():
        handles.enter_context(_weights_on_call(component))
        for name in modules:
            handles.callback(watch(name).remove)
        for batch in batches:
            floats = [t.to(torch.float32) if t.is_floating_point() else t for t in batch]
            length = floats[places["inputs_embeds"]].shape[1]
            shown = floats[places["attention_mask"]][:, -length:].reshape(-1) != 0
            component.module(*floats)
    if not seen:
        raise UsageError(
            "nothing to calibrate with",
            seen="no sample",
            fix="give calibration samples, or round to nearest, which needs none",
        )
    return seen


@contextmanager
def loaded(component: Component) -> Iterator[None]:
    """Give a component on the meta device all its weights, in float32, for the time being.

    Raises:
        CheckpointError: a weight cannot be read.
    """
    with _constants(component) as stack:
        for module, load, drop in _loaders(component):
            stack.callback(drop, module)
            load(module)
        yield


@contextmanager
def _weights_on_call(component: Component) -> Iterator[None]:
    """Give each module its parameters, in float32, while it computes."""
    with _constants(component) as stack:
        for module, load, drop in _loaders(component):
            stack.callback(drop, module)
            stack.callback(module.register_forward_pre_hook(load).remove)
            stack.callback(module.register_forward_hook(drop).remove)
        yield


_Hook = Callable[..., None]


def _loaders(component: Component) -> Iterator[tuple[nn.Module, _Hook, _Hook]]:
    """Each module that has weights, what loads them, and what takes them away again."""
    owners: dict[str, list[str]] = {}
    for key in component.weight_refs:
        owner, _, leaf = key.rpartition(".")
        owners.setdefault(owner, []).append(leaf)
    for owner, leaves in owners.items():
        module = component.module.get_submodule(owner)
        refs = {leaf: component.weight_refs[f"{owner}.{leaf}".strip(".")] for leaf in leaves}
        before = {leaf: getattr(module, leaf) for leaf in leaves}

        def load(module: nn.Module, *_: object, refs: Mapping[str, Weight] = refs) -> None:
            for leaf, ref in refs.items():
                weight = nn.Parameter(cast(ref, "F32").load(), requires_grad=False)
                setattr(module, leaf, weight)

        def drop(
            module: nn.Module, *_: object, before: Mapping[str, nn.Parameter] = before
        ) -> None:
            for leaf, parameter in before.items():
                setattr(module, leaf, parameter)

        yield module, load, drop


@contextmanager
def _constants(component: Component) -> Iterator[ExitStack]:
    """Give a component's non-persistent buffers their values; the stack ends before they go."""
    with ExitStack() as stack:
        for name, value in component.constants.items():
            owner, _, leaf = name.rpartition(".")
            module = component.module.get_submodule(owner)
            stack.callback(setattr, module, leaf, getattr(module, leaf))
            setattr(module, leaf, torch.from_numpy(value.copy()))
        yield stack
