"""Graph passes, one file each, and the pipelines they are run in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir

from gap_export.graph.lowering import (
    LOWERINGS,
    DecoderLimits,
    Lowering,
    lower,
)
from gap_export.graph.passes.fold_constants import FoldConstants
from gap_export.graph.passes.fuse_linear import FuseLinear
from gap_export.graph.passes.graph_pass import GraphPass, PassReport, fingerprint
from gap_export.graph.passes.insert_gap_remap import InsertGapRemap
from gap_export.graph.passes.strip_trace_metadata import StripTraceMetadata
from gap_export.graph.passes.take_num_kept_tokens import TakeNumKeptTokens

__all__ = [
    "LOWERINGS",
    "PIPELINES",
    "DecoderLimits",
    "FoldConstants",
    "FuseLinear",
    "GraphPass",
    "InsertGapRemap",
    "Lowering",
    "PassReport",
    "StripTraceMetadata",
    "TakeNumKeptTokens",
    "fingerprint",
    "lower",
    "run_pipeline",
]

PIPELINES: Mapping[str, tuple[GraphPass, ...]] = MappingProxyType(
    {
        "vision_encoder": (FoldConstants(), FuseLinear(), StripTraceMetadata()),
        "token_pruner": (
            FoldConstants(),
            FuseLinear(),
            TakeNumKeptTokens(),
            StripTraceMetadata(),
        ),
        "text_encoder": (FoldConstants(), FuseLinear(), StripTraceMetadata()),
        "embed_tokens": (FoldConstants(), StripTraceMetadata()),
        "decoder_model_merged": (
            FoldConstants(),
            FuseLinear(),
            InsertGapRemap(),
            StripTraceMetadata(),
        ),
    }
)


def run_pipeline(model: ir.Model, passes: Sequence[GraphPass]) -> tuple[PassReport, ...]:
    """Run passes in order, in place.

    Raises:
        PassError: one declined or broke its contract.
    """
    return tuple(graph_pass.run(model) for graph_pass in passes)
