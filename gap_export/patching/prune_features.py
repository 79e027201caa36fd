"""Passes that make a vision encoder give the kept tokens' features alone; at fixed places."""

from __future__ import annotations

from abc import abstractmethod
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import add_initializer, static_dim

FEATURES, KEEP_INDICES = "image_features", "keep_indices"
_UNPRUNED = f"{FEATURES}_unpruned"
_PREFIX = "gap_prune"
# Axes of reductions are inputs, not attributes, from here on.
_MIN_OPSET = 13


class PruneFeatures(GraphPass):
    """Gathers kept tokens from the output ``image_features`` [I, N, H]; adds ``keep_indices``.

    Tokens are taken after the projector: nothing but the drop of CLS need be known of the graph,
    and each kept row is computed as it was before. What the projector does for the dropped ones is
    lost, two products of [N, H], next to a tower's hundreds. Does not handle features of all images
    in one list, [I * N, H].

    Args:
        num_kept_tokens: K.
        num_visual_tokens: N.
    """

    def __init__(self, *, num_kept_tokens: int, num_visual_tokens: int) -> None:
        self._num_kept_tokens = num_kept_tokens
        self._num_visual_tokens = num_visual_tokens

    def apply(self, model: ir.Model) -> bool:
        """Prune.

        Raises:
            PassError: no such output, of another shape, or pruned already; a name is taken; the
                opset is too old; or what the pruner reads is not there.
        """
        graph = model.graph
        features = check_features(model, num_visual_tokens=self._num_visual_tokens)
        steps = Steps(graph)
        keep = self._choose(model, features, steps)
        pruned = self._gather(features, keep, steps)
        features.name = _UNPRUNED
        for value, name, dtype in (
            (pruned, FEATURES, features.dtype),
            (keep, KEEP_INDICES, ir.DataType.INT64),
        ):
            value.name = name
            assert dtype is not None
            value.type = ir.TensorType(dtype)
        assert features.shape is not None
        rows, _, width = features.shape
        pruned.shape = ir.Shape([rows, self._num_kept_tokens, width])
        keep.shape = ir.Shape([rows, self._num_kept_tokens])
        graph.outputs[graph.outputs.index(features)] = pruned
        graph.outputs.append(keep)
        return True

    @abstractmethod
    def _choose(self, model: ir.Model, features: ir.Value, steps: Steps) -> ir.Value:
        """int64 [I, K]."""

    @abstractmethod
    def _gather(self, features: ir.Value, keep: ir.Value, steps: Steps) -> ir.Value:
        """[I, K, H]."""


class PruneAtPlaces(PruneFeatures):
    """``spatial`` and ``random``: the same places in every image, a constant of the graph.

    Args:
        places: int64 [K] of 0..N-1, in the order they are fed.
        num_visual_tokens: N.
    """

    def __init__(self, places: NDArray[np.int64], *, num_visual_tokens: int) -> None:
        super().__init__(num_kept_tokens=len(places), num_visual_tokens=num_visual_tokens)
        self._places = places

    def _choose(self, model: ir.Model, features: ir.Value, steps: Steps) -> ir.Value:
        del model
        rows = steps("Slice", steps("Shape", features), [0], [1], [0])
        shape = steps("Concat", rows, [self._num_kept_tokens], axis=0)
        return steps("Expand", self._places[None], shape)

    def _gather(self, features: ir.Value, keep: ir.Value, steps: Steps) -> ir.Value:
        del keep
        return steps("Gather", features, self._places, axis=1)


def check_opset(model: ir.Model) -> None:
    """Refuse an opset whose reductions take their axes another way.

    Raises:
        PassError: it is too old, or none is declared.
    """
    opset = model.opset_imports.get("")
    if opset is None or opset < _MIN_OPSET:
        raise PassError(
            "the model's opset is too old for pruning",
            seen="none declared" if opset is None else opset,
            allowed=f">= {_MIN_OPSET}",
        )


def check_features(model: ir.Model, *, num_visual_tokens: int) -> ir.Value:
    """The output ``image_features`` [I, N, H].

    Raises:
        PassError: see :meth:`PruneFeatures.apply`.
    """
    graph = model.graph
    check_opset(model)
    inputs = [str(value.name) for value in graph.inputs]
    outputs = {str(value.name): value for value in graph.outputs}
    if KEEP_INDICES in outputs:
        raise PassError(
            "the vision encoder is pruned already",
            seen=f"output {KEEP_INDICES}",
            fix="patch the export as its maker left it",
        )
    if inputs != ["pixel_values"]:
        raise PassError(
            "the vision encoder has inputs that are not fed",
            seen=", ".join(inputs),
            allowed="pixel_values",
        )
    if list(outputs) != [FEATURES]:
        raise PassError(
            "the vision encoder's outputs are not what is known",
            seen=", ".join(outputs),
            allowed=FEATURES,
        )
    features = outputs[FEATURES]
    shape = features.shape
    # A length that the graph leaves open is measured where the recipe is known.
    is_other = static_dim(features, 1) not in (None, num_visual_tokens)
    if shape is None or shape.rank() != 3 or is_other:
        raise PassError(
            f"{FEATURES} is not of the shape that is pruned",
            seen=shape,
            allowed=f"[images, {num_visual_tokens}, width]",
        )
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    if KEEP_INDICES in taken or _UNPRUNED in taken:
        raise PassError("a name the pass needs is taken", seen=f"{KEEP_INDICES} or {_UNPRUNED}")
    return features


class Steps:
    """Appends nodes to a graph; arrays and lists among the operands become its constants."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._numbers = count()

    def __call__(
        self,
        op_type: str,
        *operands: ir.Value | NDArray[Any] | list[int],
        num_outputs: int = 1,
        **attributes: Any,
    ) -> ir.Value:
        """The first output of a new node."""
        name = f"{_PREFIX}_{next(self._numbers)}_{op_type}"
        inputs = [
            operand
            if isinstance(operand, ir.Value)
            else add_initializer(self._graph, f"{name}_{at}", np.asarray(operand))
            for at, operand in enumerate(operands)
        ]
        outputs = [ir.Value(name=f"{name}_out_{at}") for at in range(num_outputs)]
        plain = {
            key: int(value) if isinstance(value, ir.DataType) else value
            for key, value in attributes.items()
        }
        made = ir.convenience.convert_attributes(plain)
        self._graph.append(ir.Node("", op_type, inputs, made, outputs=outputs, name=name))
        return outputs[0]
