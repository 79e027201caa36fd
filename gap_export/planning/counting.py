"""What a component costs: its products and bytes, counted while its modules run without numbers.

On torch's meta device a module runs with shapes alone, so neither a checkpoint nor memory is
needed. A test holds the multiply-adds to those of the exported graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gap_export.families import Component
from gap_export.spec.manifest import TensorSpec

# The module, which torch hides behind its function of the same name.
scan_of_torch = import_module("torch._higher_order_ops.scan")
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}
# What moves no bytes: another way to look at the same tensor.
_VIEWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "detach"),
        *("alias", "t", "lift_fresh", "empty", "split", "unbind", "select", "slice"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product or convolution.

    Attributes:
        weight: Name of the weight that it reads; None where both sides are computed.
        multiply_adds: How many.
        weight_size: Numbers in the weight.
        moved: Numbers that are read and written beside the weight.
    """

    weight: str | None
    multiply_adds: int
    weight_size: int
    moved: int


@dataclass(kw_only=True)
class Cost:
    """What one run of a component does.

    Attributes:
        products: In order.
        num_operators: Operators that compute or move something, views not counted.
        largest: Bytes of what the largest operator reads and writes, weights not counted.
    """

    products: list[Product] = field(default_factory=list)
    num_operators: int = 0
    largest: int = 0

    @property
    def multiply_adds(self) -> int:
        """Of all products."""
        return sum(one.multiply_adds for one in self.products)


def count_component(component: Component, sizes: Mapping[str, int]) -> Cost:
    """Run a component's module on the meta device and count.

    Args:
        component: Of a reference that was built on ``meta``.
        sizes: By the name of each open dimension of its inputs.
    """
    inputs = [_empty(one, sizes) for one in component.inputs]
    with torch.no_grad(), _counted(dict(component.module.named_parameters())) as cost:
        component.module(*inputs)
    return cost


def prefill_sizes(num_tokens: int) -> dict[str, int]:
    """Open sizes of a decoder that reads a prompt."""
    return _decoder_sizes(num_tokens, 0)


def decode_sizes(num_past: int) -> dict[str, int]:
    """Open sizes of a decoder that reads one token behind so many."""
    return _decoder_sizes(1, num_past)


def _decoder_sizes(length: int, past: int) -> dict[str, int]:
    return {
        "batch_size": 1,
        "sequence_length": length,
        "past_sequence_length": past,
        "total_sequence_length": past + length,
    }


def _empty(spec: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    return torch.zeros(shape, dtype=_DTYPES[spec.dtype], device="meta")


@contextmanager
def _counted(parameters: Mapping[str, torch.Tensor]) -> Iterator[Cost]:
    mode = _Counting(parameters)
    with mock.patch.object(scan_of_torch, "scan", mode.loop), mode:
        yield mode.cost


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that runs within; formulas of products are those of torch's counter."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = Cost()
        # By id; the tensors themselves are held, so that no id is used again.
        self._weights = {id(one): (one, name) for name, one in parameters.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and write down what it does."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        ins = [one for one in args if isinstance(one, torch.Tensor)]
        if packet in _VIEWS:
            if ins and id(ins[0]) in self._weights and isinstance(out, torch.Tensor):
                self._weights[id(out)] = (out, self._weights[id(ins[0])][1])
            return out
        outs = [one for one in _flat(out) if isinstance(one, torch.Tensor)]
        named = next((self._weights[id(one)] for one in ins if id(one) in self._weights), None)
        others = [one for one in (*ins, *outs) if id(one) not in self._weights]
        self.cost.num_operators += 1
        self.cost.largest = max(
            self.cost.largest, sum(one.numel() * one.element_size() for one in others)
        )
        if packet in flop_registry:
            self.cost.products.append(
                Product(
                    weight=None if named is None else named[1],
                    multiply_adds=flop_registry[packet](*args, **kwargs, out_val=out) // 2,
                    weight_size=0 if named is None else named[0].numel(),
                    moved=sum(one.numel() for one in others),
                )
            )
        return out

    def loop(
        self, step: Any, carried: tuple[torch.Tensor, ...], turns: torch.Tensor
    ) -> tuple[Any, torch.Tensor]:
        """In place of torch's ``scan``, which would compile: one turn, counted as often as it runs.

        Returns:
            What is carried out of the loop, and what its turns give, [turns, ...].
        """
        cost, before = self.cost, (len(self.cost.products), self.cost.num_operators)
        carried, out = step(carried, turns[0])
        num_turns = int(turns.shape[0])
        cost.products += cost.products[before[0] :] * (num_turns - 1)
        cost.num_operators += (cost.num_operators - before[1]) * (num_turns - 1)
        return carried, out.new_zeros((num_turns, *out.shape))


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def weight_sizes(component: Component) -> dict[str, int]:
    """Numbers in each weight of a component."""
    return {key: math.prod(one.shape) for key, one in component.weight_refs.items()}
