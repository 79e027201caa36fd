"""A static look at a graph before it travels to a device that is not at hand.

Nobody can build an Orin's engine anywhere but on the Orin. What can be known before is whether the
graph uses what that TensorRT takes: asked of our own table of operators (:mod:`gap_export.engines.
operators`) and of trtcheck, on a copy of the graph's structure. Weights are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gap_export.engines.operators import oldest_release
from gap_export.engines.targets import Platform
from gap_export.exporting.preflight.finding import Finding
from gap_export.extras import require_extra
from gap_export.spec.manifest import GraphSpec, PreflightVerdict

__all__ = ["preflight"]


def preflight(path: Path, graph: GraphSpec, platform: Platform) -> PreflightVerdict:
    """What can be said of building a graph with the oldest TensorRT of a platform.

    Args:
        path: The ONNX file; the files its weights lie in need not be there.
        graph: What it is.
        platform: Where it is to be built.

    Returns:
        ``blocked`` where the table says no; ``unverified`` where nobody knows; else ``fine``, which
        is still a prediction. Where trtcheck contradicts the table, the table wins and the reasons
        say so.

    Raises:
        BundleError: not an ONNX file.
        MissingDependencyError: the extra ``export`` is not installed.
    """
    require_extra("export", "the pre-flight")
    from gap_export.exporting.preflight.by_table import look_up
    from gap_export.exporting.preflight.by_trtcheck import ask_trtcheck
    from gap_export.exporting.preflight.structure import read_structure

    model = read_structure(path)
    release = oldest_release(platform)
    findings = look_up(model, release, max_opset=platform.max_opset)
    findings += ask_trtcheck(model, release, already=findings)
    return PreflightVerdict(
        component=graph.component,
        verdict=_verdict(findings),
        operators=tuple(sorted({f.operator for f in findings if f.counts and f.operator})),
        reasons=tuple(f"{release.name}: {finding.reason}" for finding in findings),
    )


def _verdict(findings: Sequence[Finding]) -> Literal["fine", "unverified", "blocked"]:
    kinds = {finding.kind for finding in findings}
    if "blocked" in kinds:
        return "blocked"
    return "unverified" if "unverified" in kinds else "fine"
