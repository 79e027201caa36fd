"""Record a golden: what PyTorch gives in the dtype of what will be held against it."""

from __future__ import annotations

from pathlib import Path

from gap_export.bundle import Bundle
from gap_export.errors import OutputError, ParityError, UsageError
from gap_export.parity.golden import ReferenceFacts, check_golden_place, record_golden
from gap_export.parity.levels.fed_ids import first_wrong_fed_ids
from gap_export.parity.results import BackendKey
from gap_export.parity.truth import Truth
from gap_export.progress import Progress, SilentProgress
from gap_export.spec.manifest import BASE, ORT, GraphSpec, Manifest
from gap_export.spec.tolerances import tolerances_of

_DECODER = "decoder_model_merged"


def record_truth(
    bundle: Bundle,
    reference: Truth,
    folder: Path,
    *,
    backend: BackendKey = "ort",
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Ask a reference, and keep what it gives as a golden.

    Args:
        bundle: From :func:`gap_export.engines.folder.open_whole`.
        reference: What to ask.
        folder: The golden's.
        backend: What will be compared with it: that decides the dtype.
        force: Replace a golden that is there.
        progress: Progress reporter.

    Returns:
        The golden's folder, absolute.

    Raises:
        ParityError: what both sides would have alike is wrong.
        OutputError: the folder is taken, inside the bundle, or cannot be written.
        UsageError: no questions, nothing could be compared with it, or the checkpoint or an image
            cannot be used.
    """
    check_golden_place(folder, force=force)
    if folder.resolve().is_relative_to(bundle.path):
        raise OutputError(
            "the golden would be inside the bundle, which would then be refused",
            seen=folder,
            fix="choose a place outside of it",
        )
    graph = _decoder(bundle.manifest, backend)
    tolerances_of(graph.dtype)
    recorded = reference.record(
        bundle,
        dtype=graph.dtype,
        quantization=graph.quantization,
        progress=progress or SilentProgress(),
    )
    wrong = [*recorded.other_facts, *(row.reason for row in recorded.shared if not row.passed)]
    wrong += filter(None, [first_wrong_fed_ids(recorded, bundle.manifest)])
    if wrong:
        raise ParityError(
            "a golden is not recorded of a bundle that is wrong already",
            seen="; ".join(wrong),
            fix="export the bundle again",
        )
    return record_golden(
        folder,
        manifest=bundle.manifest,
        reference=ReferenceFacts(
            name=recorded.name, dtype=graph.dtype, quantization=graph.quantization
        ),
        questions=reference.questions,
        calls=recorded.calls,
        answers=recorded.answers,
        seed=reference.seed,
        force=force,
    )


def _decoder(manifest: Manifest, backend: BackendKey) -> GraphSpec:
    if backend != "trt":
        return manifest.graph(_DECODER)
    for graph in manifest.graphs:
        if graph.component == _DECODER and graph.lowering not in {BASE, ORT}:
            return graph
    raise UsageError(
        "the bundle has no graphs for TensorRT, whose dtype a golden could have",
        seen=", ".join(graph.lowering for graph in manifest.graphs if graph.component == _DECODER),
        fix="export it again with --trt",
    )
