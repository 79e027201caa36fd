"""Shapes that a graph's maker left open, worked out on a copy."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from gap_export.errors import PassError
from gap_export.patching.read_graph import first_line, quiet


def with_shapes(model: ir.Model) -> ir.Model:
    """A copy of a model with all the shapes that ONNX's own inference finds; no weight is read.

    Raises:
        PassError: the graph does not hold together.
    """
    inference = common_passes.ShapeInferencePass(data_prop=True)
    try:
        # What it fails at, it reports, and leaves the shapes open.
        with quiet(type(inference).__module__):
            return inference(model.clone()).model
    except (RuntimeError, ValueError) as err:
        raise PassError(
            "shapes cannot be worked out",
            seen=first_line(err),
            fix="get the export again, or export the model again",
        ) from err
