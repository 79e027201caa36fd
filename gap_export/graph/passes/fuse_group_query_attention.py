"""Makes attention and its growing cache one GroupQueryAttention of ONNX Runtime's own a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.rewriter.pattern import OrValue

from gap_export.errors import PassError
from gap_export.graph.passes.fuse_attention import is_log_of_mask, last_product, shared_heads
from gap_export.graph.passes.fuse_simplified_norm import NORM
from gap_export.graph.passes.matching import (
    CONTRIB,
    add_initializer,
    constant,
    contrib,
    describe,
    is_contrib,
    is_operator,
    like,
    new_value,
    static_dim,
)
from gap_export.graph.passes.pattern_pass import PatternPass
from gap_export.graph.passes.rotate_by_rows import ROTARY
from gap_export.graph.passes.update_cache_in_place import PAST

ATTENTION = "GroupQueryAttention"
NUM_SLOTS = "num_slots"
_MASK = "attention_mask"
_BY_TOKEN = (0, 2, 1, 3)
_LOWEST = np.finfo(np.float32).min


class FuseGroupQueryAttention(PatternPass):
    """Rewrites attention over ``Concat(past, new)`` to a GroupQueryAttention that rotates nothing.

    Inputs ``past_key_values.{i}.*`` and outputs ``present.{i}.*`` become [B, heads, num_slots, d];
    fed and given as one buffer, the node writes the new slots into it. Heads stay beside each other
    in a token's row, [B, S, heads * d], so that nothing is transposed.

    **The mask means less than in the base graph**: the node counts the filled slots of each row,
    so that ``attention_mask`` [B, T] must hold what is visible and behind it zeros. What a slot
    counts as in proportional attention goes in as a bias. Rows that are padded or hidden elsewhere
    are for the caller to feed without what is hidden; each row's new tokens go behind its own last
    slot. With tokens in the cache, several more are taken of one row alone.

    To be run after FuseSimplifiedNorm and RotateByRows. Does not handle: masks other than "not in
    the future, by slot, and ``attention_mask`` is not 0" (sliding windows, say), caches that
    anything else reads, biases other than the log of ``attention_mask``.
    """

    def __init__(self) -> None:
        # What all layers share; filled anew by each run.
        self._shared: dict[str, ir.Value] = {}
        # By the bias of the base graph: what of it the node takes as a bias.
        self._known_masks: dict[ir.Value, ir.Value | None] = {}

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was attention over a cache.

        Raises:
            PassError: attention is masked in another way, or the cache's length is read elsewhere.
        """
        self._shared.clear()
        self._known_masks.clear()
        modified = super().apply(model)
        if modified:
            model.opset_imports[CONTRIB] = 1
            common_passes.RemoveUnusedNodesPass()(model)
            _check_lengths_unread(model.graph)
        return modified

    def pattern(
        self, op: Any, query: Any, key: Any, value: Any, scale: Any, bias: Any, shape: Any
    ) -> Any:
        """Attention of query [B, heads, S, d], key and value [B, heads, T, d], as a matrix."""
        product = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
        scores = op.Mul(product, scale)
        wide = OrValue([op.Cast(scores), scores], tag_var="stays_wide")
        weights = op.Softmax(op.Add(wide, bias), _outputs=["weights"])
        narrow = OrValue([op.Cast(weights), weights], tag_var="stays_narrow")
        return op.Reshape(op.Transpose(op.MatMul(narrow, value), perm=[0, 2, 1, 3]), shape)

    def replace(self, last: ir.Node, **values: Any) -> ir.Node:
        """The last Reshape, of what one GroupQueryAttention before it gives."""
        softmax, scale = values["weights"].producer(), constant(values["scale"])
        where, graph = f"attention at {softmax.name}", last.graph
        assert isinstance(graph, ir.Graph)
        if softmax.attributes.get_int("axis", -1) not in {-1, 3} or last_product(softmax) is None:
            raise PassError(f"{where}: its weights are read by something else")
        if scale is None or scale.size != 1:
            raise PassError(f"{where}: the scale is not one number", seen=describe(values["scale"]))
        counts = self._read_mask(values["bias"], where)
        query = values["query"]
        caches = [_find_cache(shared_heads(values[n], where), where) for n in ("key", "value")]
        heads, width = static_dim(query, 1), static_dim(query, 3)
        few = static_dim(caches[0][0], 1)
        if None in (heads, width, few):
            raise PassError(f"{where}: heads are not known", seen=f"{query.shape}")
        fresh = [query, *(concat.inputs[1] for _, concat in caches)]
        flat = [self._by_token(graph, last, value) for value in fresh]
        made = new_value(f"{last.name}.attended", query.dtype, flat[0].shape)
        presents = []
        for past, concat in caches:
            past.shape = _with_slots(past.shape)
            old = concat.outputs[0]
            present = new_value(old.name, old.dtype, past.shape)
            presents.append(present)
            for index, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[index] = present
        settings = {
            "num_heads": heads, "kv_num_heads": few, "scale": float(scale.reshape(())),
            "do_rotary": 0,
        }  # fmt: skip
        inputs: list[ir.Value | None] = [
            *flat,
            *(past for past, _ in caches),
            *self._lengths(graph, last, counts),
        ]
        if counts is not None:
            # Between them: rotary caches and position ids, which it has no use for.
            inputs += [None, None, None, self._bias(graph, last, counts, query.dtype)]
        node = contrib(ATTENTION, inputs, settings, [made, *presents], f"{last.name}.attention")
        node.metadata_props.update(softmax.metadata_props)
        graph.insert_before(last, node)
        return ir.node(
            "Reshape", [made, values["shape"]], dict(last.attributes.items()),
            outputs=[like(last.outputs[0])], name=last.name,
        )  # fmt: skip

    def is_left(self, node: ir.Node) -> bool:
        """A Softmax whose result is multiplied as a matrix and read by nothing else."""
        return last_product(node) is not None

    def _lengths(self, graph: ir.Graph, last: ir.Node, counts: ir.Value | None) -> list[ir.Value]:
        """The last filled slot of each row, int32 [B], and the slots of the longest, int32 []."""
        if "last_slot" not in self._shared:
            (mask,) = (value for value in graph.inputs if value.name == _MASK)
            add = _Adder(graph, last, "attention")
            axis = add_initializer(graph, "attention.axis", np.array([1]))
            one = add_initializer(graph, "attention.one", np.array(1))
            slots = mask
            if counts is not None:
                # Whatever it counts as, it is one slot.
                slots = add("visible", "Min", [mask, one], ir.DataType.INT64)
            filled = add("filled", "ReduceSum", [slots, axis], ir.DataType.INT64, keepdims=0)
            slot = add("last_filled", "Sub", [filled, one], ir.DataType.INT64)
            longest = add("longest", "Shape", [mask], ir.DataType.INT64, start=1, end=2)
            number = add("num_slots", "Squeeze", [longest], ir.DataType.INT64)
            narrow = ir.DataType.INT32
            for name, value in (("last_slot", slot), ("total", number)):
                self._shared[name] = add(name, "Cast", [value], narrow, to=narrow.value)
        return [self._shared["last_slot"], self._shared["total"]]

    def _by_token(self, graph: ir.Graph, last: ir.Node, heads: ir.Value) -> ir.Value:
        """[B, heads, S, d] as rows of tokens, [B, S, heads * d]."""
        node, many = heads.producer(), static_dim(heads, 1)
        width = static_dim(heads, 3)
        assert heads.shape is not None and many is not None and width is not None
        shape = ir.Shape([heads.shape[0], heads.shape[2], many * width])
        if is_contrib(node, ROTARY):
            assert node is not None and node.inputs[0] is not None
            below = self._by_token(graph, last, node.inputs[0])
            out = new_value(f"{heads.name}.by_token", heads.dtype, shape)
            settings = {**{k: v.value for k, v in node.attributes.items()}, "num_heads": many}
            # The width of heads tells by itself only where all of it is rotated.
            settings.setdefault("rotary_embedding_dim", 0)
            inputs = [below, *node.inputs[1:]]
            graph.insert_before(last, contrib(ROTARY, inputs, settings, [out], node.name))
            return out
        add, whole = _Adder(graph, last, f"{heads.name}.by_token"), ir.DataType.INT64
        turned = self._turned(add, heads)
        cut = turned.producer()
        if cut is not None and is_operator(cut, "Reshape") and _is_matrix(cut.inputs[0]):
            (turned, _) = cut.inputs  # type: ignore[assignment]
        if "size" not in self._shared:
            (ids,) = (value for value in graph.inputs if value.name == "position_ids")
            size = _Adder(graph, last, "attention")("size", "Shape", [ids], whole)
            self._shared["size"] = size
        rest = add_initializer(graph, f"attention.width_{many * width}", np.array([many * width]))
        key = f"size_{many * width}"
        if key not in self._shared:
            sized = _Adder(graph, last, "attention")
            self._shared[key] = sized(key, "Concat", [self._shared["size"], rest], whole, axis=0)
        out = add("rows", "Reshape", [turned, self._shared[key]], heads.dtype)
        out.shape = shape
        return out

    def _turned(self, add: _Adder, heads: ir.Value) -> ir.Value:
        """[B, heads, S, d] as [B, S, heads, d]."""
        node = heads.producer()
        if node is not None and is_operator(node, "Transpose"):
            perm, source = node.attributes.get_ints("perm", ()), node.inputs[0]
            if tuple(perm) == _BY_TOKEN and source is not None:
                return source
        if node is not None and is_operator(node, NORM) and node.inputs[0] is not None:
            # A norm of each head by itself does not mind in which order they lie.
            inputs = [self._turned(add, node.inputs[0]), *node.inputs[1:]]
            settings = {name: value.value for name, value in node.attributes.items()}
            return add("norm", NORM, inputs, heads.dtype, **settings)
        return add("turned", "Transpose", [heads], heads.dtype, perm=_BY_TOKEN)

    def _bias(
        self, graph: ir.Graph, last: ir.Node, counts: ir.Value, dtype: ir.DataType
    ) -> ir.Value:
        """What is added to scores, [B, 1, 1, T], for each query: [B, 1, S, T]."""
        if "bias" not in self._shared:
            (ids,) = (value for value in graph.inputs if value.name == "position_ids")
            add, whole = _Adder(graph, last, "attention"), ir.DataType.INT64
            before = add_initializer(graph, "attention.before_queries", np.array([1, 1]))
            behind = add_initializer(graph, "attention.axis", np.array([1]))
            queries = add("num_queries", "Shape", [ids], whole, start=1, end=2)
            each = add("of_each_query", "Concat", [before, queries, behind], whole, axis=0)
            narrow = add("counts", "Cast", [counts], dtype, to=dtype.value)
            self._shared["bias"] = add("bias", "Expand", [narrow, each], dtype)
        return self._shared["bias"]

    def _read_mask(self, bias: ir.Value, where: str) -> ir.Value | None:
        """What a mask adds to the scores of visible keys; None where that is nothing."""
        if bias in self._known_masks:
            return self._known_masks[bias]
        node = bias.producer()
        while node is not None and is_operator(node, "Cast"):
            node = node.predecessors()[0]
        allowed, added, lowest = node.inputs if is_operator(node, "Where") and node else [None] * 3
        number = constant(lowest)
        blocks = number is not None and number.size == 1 and number.item() == _LOWEST
        adds_nothing = constant(added) is not None and not np.any(constant(added))
        is_known = adds_nothing or is_log_of_mask(added)
        if allowed is None or not blocks or not is_known or not _is_causal_mask(allowed):
            raise PassError(
                f"{where}: masked in another way",
                seen=describe(allowed or bias),
                allowed="a bias that is 0, or the log of attention_mask, where key slot <= query "
                "slot and attention_mask is not 0, and elsewhere the lowest number of float32",
            )
        self._known_masks[bias] = None if adds_nothing else added
        return self._known_masks[bias]


class _Adder:
    """Adds nodes before another."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str) -> None:
        self._graph, self._before, self._prefix = graph, before, prefix

    def __call__(
        self, name: str, op_type: str, inputs: list[Any], dtype: Any, **settings: Any
    ) -> ir.Value:
        out = new_value(f"{self._prefix}.{name}", dtype, None)
        node = ir.node(op_type, inputs, settings, outputs=[out], name=out.name)
        self._graph.insert_before(self._before, node)
        return out


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.rank() == 2


def _find_cache(grown: ir.Value, where: str) -> tuple[ir.Value, ir.Node]:
    """The past of a cache, and the Concat that extends it by what is new.

    Raises:
        PassError: keys or values are not those of a cache.
    """
    concat = grown.producer()
    past = None if concat is None else concat.inputs[0]
    is_cache = past is not None and past.is_graph_input() and PAST.fullmatch(past.name or "")
    if (
        concat is None or past is None or not is_cache or not is_operator(concat, "Concat")
        or len(concat.inputs) != 2 or concat.attributes["axis"].as_int() not in {2, -2}
        or not grown.is_graph_output() or past.shape is None or past.shape.rank() != 4
    ):  # fmt: skip
        raise PassError(
            f"{where}: its keys or values are not a cache extended by what is new",
            seen=describe(grown),
            allowed="Concat(past_key_values.{i}.key, new) on axis 2, a graph output",
        )
    return past, concat


def _with_slots(shape: ir.Shape | None) -> ir.Shape:
    assert shape is not None
    return ir.Shape([NUM_SLOTS if axis == 2 else dim for axis, dim in enumerate(shape)])


def _check_lengths_unread(graph: ir.Graph) -> None:
    """See that no node takes the slots of a buffer for those that are filled.

    Raises:
        PassError: one does.
    """
    for past in graph.inputs:
        if not PAST.fullmatch(past.name or ""):
            continue
        for node, _ in past.uses():
            if is_contrib(node, ATTENTION):
                continue
            start, end = (node.attributes.get_int(k, d) for k, d in (("start", 0), ("end", 4)))
            if not is_operator(node, "Shape") or 2 in range(4)[start:end]:
                raise PassError(
                    f"the cache {past.name} is read otherwise than by attention",
                    seen=f"{node.op_type} {node.name}",
                    allowed=ATTENTION,
                )


def _is_causal_mask(allowed: ir.Value) -> bool:
    """Whether it is ``key <= query + past`` and ``attention_mask != 0``."""
    both = allowed.producer()
    if both is None or not is_operator(both, "And"):
        return False
    sides = [_unsqueezed(value) for value in both.inputs]
    return any(_is_order(a) and _is_visible(b) for a, b in (sides, sides[::-1]))


def _is_order(value: ir.Value | None) -> bool:
    """``Range(0, past + S) <= Range(0, S) + past``."""
    node = None if value is None else value.producer()
    if node is None or not is_operator(node, "LessOrEqual"):
        return False
    keys, queries = (_range_of(_unsqueezed(side)) for side in node.inputs)
    return keys is not None and queries is not None and keys == queries


def _range_of(value: ir.Value | None) -> frozenset[ir.Value | None] | None:
    """Of keys what their number is the sum of; of queries their number and what is added."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    counted, added = value, []
    if is_operator(node, "Add"):
        ranges = [v for v in node.inputs if v is not None and is_operator(v.producer(), "Range")]
        if len(ranges) != 1:
            return None
        (counted,) = ranges
        added = [v for v in node.inputs if v is not counted]
        node = counted.producer()
    if node is None or not is_operator(node, "Range"):
        return None
    start, limit, step = node.inputs
    first, by = constant(start), constant(step)
    if first is None or first.item() != 0 or by is None or by.item() != 1 or limit is None:
        return None
    if added:
        return frozenset([limit, *added])
    total = limit.producer()
    return frozenset(total.inputs) if total is not None and is_operator(total, "Add") else None


def _is_visible(value: ir.Value | None) -> bool:
    """``attention_mask != 0``."""
    node = None if value is None else value.producer()
    if node is not None and is_operator(node, "Not"):
        equal = None if node.inputs[0] is None else node.inputs[0].producer()
        if equal is None or not is_operator(equal, "Equal"):
            return False
        mask, number = equal.inputs[0], constant(equal.inputs[1])
        return mask is not None and mask.name == _MASK and number is not None and number.item() == 0
    return False


def _unsqueezed(value: ir.Value | None) -> ir.Value | None:
    """What a value is, without added axes."""
    while value is not None and is_operator(value.producer(), "Unsqueeze"):
        value = value.producer().inputs[0]  # type: ignore[union-attr]
    return value
