"""Where numbers begin to be none: the first operation whose result does not fit its dtype.

float16 ends at 65504: what is above becomes infinity, and then NaN. That is so in PyTorch and in a
graph alike; the first place is looked for in both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gap_export.bundle import Bundle
from gap_export.graph.onnx_file import OnnxFile
from gap_export.parity.compare import largest_of
from gap_export.parity.inside.divergence import name_of_call
from gap_export.parity.inside.graph_search import CHUNK
from gap_export.parity.inside.module_taps import find_taps
from gap_export.parity.inside.reference_taps import ReferenceCall, ReferenceTaps
from gap_export.parity.inside.taps import Arrays, run_taps
from gap_export.parity.replay import Call
from gap_export.parity.results import Divergence

# Their results are what was in the memory before.
_UNFILLED = ("empty", "new_empty")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """An operation whose result is not finite.

    Attributes:
        operator: PyTorch's name of it, or the node's operator.
        largest_input: Largest number that it was given.
        module: The innermost module of the reference that it is part of, dotted.
        value: Largest number of its result, computed in float32.
        tensor: What the node of a graph gives.
        node: Its name.
    """

    operator: str
    largest_input: float = float("inf")
    module: str = ""
    value: float = float("inf")
    tensor: str = ""
    node: str = ""


def find_overflow(
    bundle: Bundle, call: Call, truth: ReferenceTaps, *, calls: Sequence[Call] = ()
) -> Divergence | None:
    """The first operation of a call that gives NaN or infinity for numbers.

    Args:
        bundle: A checked one; its base graph is run, without optimizations, where it has the
            reference's dtype.
        call: A recorded call, on either side of which something is not finite.
        truth: The reference.
        calls: All calls of the same question; a decode step needs those before it.

    Returns:
        None where all is finite on both sides.

    Raises:
        UsageError: a decode step without those before it.
        GapExportError: ONNX Runtime cannot run the graph.
    """
    component = call.component
    replayed = truth.replay(component, call, calls)
    inside = _in_reference(replayed)
    spec = bundle.manifest.graph(component)
    graph = OnnxFile.read(bundle.file(spec.file)) if spec.dtype == truth.reference.dtype else None
    outside = None if graph is None else _in_graph(graph, replayed.feed)
    if inside is None and outside is None:
        return None
    if inside is None:
        assert outside is not None, "one of the two was found"
        cause = (
            f"The largest number it is given is {outside.largest_input:.4g}. PyTorch computes the "
            "same call in finite numbers."
        )
    else:
        cause = (
            f"The largest number it is given is {inside.largest_input:.4g}; so it is in PyTorch "
            f"({inside.operator})"
        )
        if outside is not None:
            cause += " and in the bundle's graph."
        else:
            cause += "." if graph is None else ", while the bundle's graph ends in finite numbers."
    named = outside or (graph and inside and _node_of(graph, inside.module)) or inside
    assert named is not None
    return Divergence(
        kind="overflows",
        component=component,
        call=name_of_call(call, component),
        tensor=named.tensor,
        operator=named.operator,
        node=named.node,
        module="" if inside is None else inside.module,
        max_abs_diff=float("inf") if inside is None else inside.value,
        allowed=float(torch.finfo(getattr(torch, spec.dtype)).max),
        last_agreeing="",
        cause=cause,
    )


class _FirstOverflow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, and keeps the first whose result is not finite while its inputs are."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: _Place | None = None
        self._running = running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it gives."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func.overloadpacket).rpartition(".")[2]
        is_fine = self.found is not None or name in _UNFILLED
        if not is_fine and not all(map(_is_finite, _floats(result))):
            given = _floats((args, kwargs))
            if all(map(_is_finite, given)):
                wide = func(*tree_map(_widen, args), **tree_map(_widen, kwargs))
                self.found = _Place(
                    operator=name,
                    module=self._running[-1] if self._running else "",
                    largest_input=max((_largest(value) for value in given), default=0.0),
                    value=max(map(_largest, _floats(wide)), default=float("inf")),
                )
        return result


def _in_reference(replayed: ReferenceCall) -> _Place | None:
    module, running = replayed.component.module, list[str]()
    for name, parameter in module.named_parameters():
        if not _is_finite(parameter):
            return _Place(operator=f"the weight {name}", module=name.rpartition(".")[0])
    seen = _FirstOverflow(running)
    with _tracked(module, running), seen:
        replayed.modules(())
    return seen.found


@contextmanager
def _tracked(module: torch.nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the names of the modules that are being run, innermost last."""
    handles = []
    for name, part in module.named_modules():

        def enter(part: Any, args: Any, name: str = name) -> None:
            del part, args
            running.append(name)

        def leave(part: Any, args: Any, output: Any) -> None:
            del part, args, output
            running.pop()

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_graph(graph: OnnxFile, feed: Arrays) -> _Place | None:
    """By bisection: what is not finite stays so, down to an output."""
    if all(map(is_number, run_taps(graph, graph.outputs, feed).values())):
        return None
    names = [name for node in graph.nodes for name in node.outputs if name]
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]

    def is_off(chunk: list[str]) -> bool:
        return not all(map(is_number, run_taps(graph, chunk, feed).values()))

    # The last one is off where none of those before it is.
    first = chunks[bisect_left(chunks[:-1], True, key=is_off)]
    seen = run_taps(graph, first, feed)
    name = next((name for name in first if not is_number(seen[name])), None)
    if name is None:
        return None
    node = graph.nodes[graph.producers[name]]
    given = run_taps(graph, [value for value in node.inputs if value], feed).values()
    sizes = (largest_of(value) for value in given if value.dtype.kind == "f")
    return _Place(
        operator=node.op_type, tensor=name, node=node.name, largest_input=max(sizes, default=0)
    )


def _node_of(graph: OnnxFile, module: str) -> _Place | None:
    """The node that gives what a module gives."""
    for tap in find_taps(graph, ()):
        if tap.module == module and tap.side == "output" and tap.value in graph.producers:
            node = graph.nodes[graph.producers[tap.value]]
            return _Place(operator=node.op_type, tensor=tap.value, node=node.name)
    return None


def is_number(values: NDArray[Any]) -> bool:
    """Whether all floats of an array are finite."""
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _floats(values: Any) -> list[torch.Tensor]:
    return [
        leaf
        for leaf in tree_leaves(values)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    ]


def _is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _largest(value: torch.Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _widen(leaf: Any) -> Any:
    """A tensor, or a dtype that is asked for, in float32."""
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return leaf.to(torch.float32)
    return torch.float32 if leaf in (torch.float16, torch.bfloat16) else leaf
