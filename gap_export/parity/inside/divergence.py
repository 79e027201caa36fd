"""Where a graph begins to be wrong: the first tensor that diverges, its operator and its module.

In two steps. At the borders of modules the graph is compared with what PyTorch's modules were given
and gave; the first border that is off is found by bisection, so that a few values are held at a
time. Between it and the last one that is right the graph is compared, value by value, with one that
an export makes now.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from gap_export.bundle import Bundle
from gap_export.parity.inside.changed_nodes import Place, wrong_operator, wrong_weight
from gap_export.parity.inside.graph_search import CHUNK, Look, Search
from gap_export.parity.inside.module_taps import Tap, find_taps
from gap_export.parity.inside.reference_taps import ReferenceTaps
from gap_export.parity.replay import Call
from gap_export.parity.results import Divergence, TensorRow
from gap_export.parity.tally import tensor_row


def find_divergence(
    bundle: Bundle, component: str, call: Call, truth: ReferenceTaps, *, calls: Sequence[Call] = ()
) -> Divergence | None:
    """The first tensor of a base graph that is not what it should be.

    The graph is run by ONNX Runtime without optimizations.

    Args:
        bundle: A checked one.
        component: The component of the graph.
        call: A recorded call of that component whose outputs are off.
        truth: What it is compared with.
        calls: All calls of the same question; a decode step needs those before it.

    Returns:
        None where nothing of it is off by more than is allowed: what is wrong lies in how the
        graph was run.

    Raises:
        UsageError: a decode step without those before it, or a dtype that is not compared.
        GapExportError: ONNX Runtime cannot run the graph.
    """
    search = Search.of(bundle, component, call, truth, calls)
    taps = find_taps(search.graph, [spec.name for spec in search.replayed.component.outputs])
    found = _bisect(search, taps)
    if found is None:
        return None
    first, last, before = found
    place = wrong_weight(search, first, before) or wrong_operator(search, first, before, truth)
    if isinstance(place, str):
        # An input of the graph has no node: some module reads it that must not.
        index = search.graph.producers.get(first.tap.value)
        node = None if index is None else search.graph.nodes[index]
        where = Place(
            tensor=first.tap.value,
            operator="" if node is None else node.op_type,
            node="" if node is None else node.name,
            module=first.tap.module if first.tap.side is not None else "",
            cause=place,
        )
    else:
        where = place
    return Divergence(
        component=component,
        call=name_of_call(call, component),
        tensor=where.tensor,
        operator=where.operator,
        node=where.node,
        module=where.module,
        max_abs_diff=first.max_abs_diff if where.max_abs_diff is None else where.max_abs_diff,
        allowed=first.allowed if where.allowed is None else where.allowed,
        last_agreeing=where.last_agreeing or ("" if last is None else last.value),
        cause=where.cause,
    )


def compare_layers(
    bundle: Bundle, component: str, call: Call, truth: ReferenceTaps, *, calls: Sequence[Call] = ()
) -> tuple[TensorRow, ...]:
    """What every module of a component gives, beside what the reference's does.

    Args:
        bundle: A checked one.
        component: The component whose base graph is run, without optimizations.
        call: A recorded call of it.
        truth: What it is compared with.
        calls: All calls of the same question; a decode step needs those before it.

    Returns:
        A row for each module with a weight, in the order in which they are run.

    Raises:
        UsageError: a decode step without those before it, or a dtype that is not compared.
        GapExportError: ONNX Runtime cannot run the graph.
    """
    search = Search.of(bundle, component, call, truth, calls)
    taps = [tap for tap in find_taps(search.graph, ()) if tap.side == "output"]
    suffix = f" ({name_of_call(call, component).split(' ')[0]})" if call.is_decode else ""
    return tuple(
        tensor_row(
            component,
            f"{tap.value}{suffix}",
            [(expected, seen)],
            search.tolerance_of(expected),
            module=tap.module or component,
        )
        for start in range(0, len(taps), CHUNK)
        for tap, expected, seen in search.pairs(taps[start : start + CHUNK])
    )


def _bisect(search: Search, taps: Sequence[Tap]) -> tuple[Look, Tap | None, list[Tap]] | None:
    """The first tap that is off, the one before it, and all before it; None if there is none.

    What is wrong stays wrong from there on, as far as this goes; that the tap before agrees is
    looked at in any case.
    """
    chunks = [taps[start : start + CHUNK] for start in range(0, len(taps), CHUNK)]
    looked: dict[int, list[Look]] = {}

    def is_off(index: int) -> bool:
        looked[index] = search.look(chunks[index])
        return not all(look.agrees for look in looked[index])

    first = bisect_left(range(len(chunks)), True, key=is_off)
    if first == len(chunks):
        return None
    before = [tap for chunk in chunks[:first] for tap in chunk]
    for look in looked[first]:
        if not look.agrees:
            return look, before[-1] if before else None, before
        before.append(look.tap)
    raise AssertionError("a chunk that is off has a tap that is off")


def name_of_call(call: Call, component: str) -> str:
    """``prefill``, ``decode 1``, ..., or the component's name."""
    if not call.is_decode:
        return component
    mask, table = call.inputs["attention_mask"], call.inputs["kept_positions"]
    step = mask.shape[1] - table.shape[-1]
    return f"decode {step}" if step else "prefill"
