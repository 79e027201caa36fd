"""Make bundles, and engines in them: ``export``, ``patch`` and ``build``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from gap_export import exporting, patching
from gap_export.checkpoint.find.source import MAIN
from gap_export.engines.folder import EngineFolder
from gap_export.exporting import ExportOptions, ExportReport
from gap_export.patching import PatchOptions, PatchReport
from gap_export.progress import Progress
from gap_export.spec.requests import (
    AS_STORED,
    DEFAULT_BUILD,
    DEFAULT_PRUNING,
    NO_ENGINES,
    OWN_LIMITS,
    BuildOptions,
    EnginesRequest,
    LimitsRequest,
    PruningRequest,
    WeightsRequest,
)

Parts = Mapping[str, str | Path] | str | Path
Warn = Callable[[str], None]


def export(
    model: str | Path,
    pruning: PruningRequest = DEFAULT_PRUNING,
    *,
    weights: WeightsRequest = AS_STORED,
    engines: EnginesRequest = NO_ENGINES,
    recipe: str | None = None,
    checkpoint: Parts | None = None,
    copy_weights: bool = False,
    bake_positions: bool = False,
    random_weights: bool = False,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> ExportReport:
    """Export a pruned model as a bundle, which appears when complete, or not at all.

    Args:
        model: Name or alias of a recipe, its hub id, or a checkpoint folder.
        pruning: Which visual tokens survive.
        weights: In which dtype weights are stored.
        engines: What is prepared for TensorRT, and built where this machine can.
        recipe: The recipe that a checkpoint folder without a recipe.yaml follows.
        checkpoint: The checkpoint's folder, or its parts by role; None to look for it.
        copy_weights: Copy weights that could be linked, for tools that refuse links.
        bake_positions: Have the decoder hold ``kept_positions``, for runtimes that feed
            ``position_ids`` alone; where pruner and the image's place are fixed.
        random_weights: Take no checkpoint: draw noise of the model's true shape.
        out: The bundle's folder; None for ``./<model>-<pruner>-<keep>``.
        force: Replace a bundle that is there; no other folder is ever replaced.
        progress: Progress reporter.
        warn: Receives what is odd about the checkpoint or may go wrong while engines are built.

    Returns:
        The bundle's folder, its manifest, and what was built.

    Raises:
        UsageError: an option, the recipe, the checkpoint or the output folder is not usable.
        ExportError: tracing or a pass failed.
        EngineError: an engine could not be built; the bundle stays.

    Example:
        >>> import gap_export
        >>> pruning = gap_export.PruningRequest(keep_ratio=0.3)
        >>> report = gap_export.export("refshapes-llava", pruning, out="demo")
        >>> report.manifest.pruning.num_kept_tokens
        43
    """
    dtype, quantization, activations = weights.resolve()
    calibration = None
    if quantization is not None and quantization.method == "awq":
        from gap_export.evaluation.refshapes import calibration_questions

        calibration = tuple(calibration_questions())
    options = ExportOptions(
        model=str(model),
        pruning=pruning,
        out=None if out is None else Path(out),
        force=force,
        recipe=recipe,
        checkpoint=parts_of(checkpoint),
        dtype=dtype,
        quantization=quantization,
        activations=activations,
        vision_dtype=weights.vision_dtype,
        calibration=calibration,
        copy_weights=copy_weights,
        bake_positions=bake_positions,
        random_weights=random_weights,
        engines=engines,
    )
    return exporting.export_model(options, progress=progress, warn=warn)


def patch(
    export: str | Path,
    pruning: PruningRequest = DEFAULT_PRUNING,
    *,
    recipe: str | None = None,
    variant: Literal["fp32", "fp16"] | None = None,
    copy_weights: bool = False,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PatchReport:
    """Prune an ONNX export that another tool made; it needs no PyTorch, and the export stays.

    Args:
        export: Folder with vision_encoder, embed_tokens and decoder_model_merged .onnx,
            config.json and tokenizer.json.
        pruning: Which visual tokens survive: keep_ratio, pruner, positions, canvas and seed may be
            chosen.
        recipe: The recipe that says how the model is asked; None for the export's own, or the one
            whose sizes fit.
        variant: Which files, where there are several of a graph.
        copy_weights: Copy weights that could be linked, for tools that refuse links.
        out: The bundle's folder; None for ``./<model>-<pruner>-<keep>``.
        force: Replace a bundle that is there; no other folder is ever replaced.
        progress: Progress reporter.

    Raises:
        UsageError: the export cannot be patched, and why; an option or the output folder is not
            usable.
        MissingDependencyError: the ``patch`` extra is not installed.

    Example:
        >>> import gap_export
        >>> gap_export.patch("no-such-folder")
        Traceback (most recent call last):
        gap_export.errors.UsageError: no folder of that name: ...
    """
    options = PatchOptions(
        export=Path(export),
        pruning=pruning,
        out=None if out is None else Path(out),
        force=force,
        recipe=recipe,
        variant=variant,
        copy_weights=copy_weights,
    )
    return patching.patch_export(options, progress=progress)


def build(
    bundle: str | Path,
    targets: Sequence[str],
    *,
    only: Sequence[str] = (),
    limits: LimitsRequest = OWN_LIMITS,
    options: BuildOptions = DEFAULT_BUILD,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> list[EngineFolder]:
    """Build TensorRT engines into a bundle: for rtx anywhere, else on the GPU they are for.

    Args:
        bundle: Its folder; every byte of it is hashed first.
        targets: rtx, rtx:sm89, desktop, orin or thor.
        only: The components to build; empty for all. Other engines stay.
        limits: The largest inputs that the engines take.
        options: How they are built.
        progress: Progress reporter.
        warn: Receives what may go wrong for want of memory.

    Returns:
        A folder for each target and GPU generation.

    Raises:
        BundleError: the bundle is damaged, or was not made for the target.
        UsageError: no such target, component or size.
        EngineError: TensorRT does not take a graph, or cannot build it.

    Example:
        >>> import gap_export
        >>> gap_export.build("demo", ["jetson"])
        Traceback (most recent call last):
        gap_export.errors.UsageError: unknown TensorRT target: 'jetson'...
    """
    from gap_export.engines.command import run_build
    from gap_export.progress import SilentProgress

    return run_build(
        Path(bundle),
        targets,
        only=only,
        overrides=limits,
        options=options,
        progress=progress or SilentProgress(),
        warn=warn or (lambda _: None),
    )


def parts_of(checkpoint: Parts | None) -> dict[str, Path]:
    """The parts of a checkpoint by their roles; a path alone is the main part."""
    if checkpoint is None:
        return {}
    parts = checkpoint if isinstance(checkpoint, Mapping) else {MAIN: checkpoint}
    return {role: Path(path) for role, path in parts.items()}
