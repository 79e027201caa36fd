"""Puts a pruner and GapRemap into ONNX exports of other tools, by graph passes alone."""

from __future__ import annotations

from gap_export.bundle.writing import check_output
from gap_export.extras import require_extra
from gap_export.patching.find_export import find_export
from gap_export.patching.options import PatchOptions, PatchReport, check_request
from gap_export.progress import Progress, SilentProgress
from gap_export.spec.positions import check_keep_ratio
from gap_export.spec.recipe import find_recipe

__all__ = ["PatchOptions", "PatchReport", "patch_export"]


def patch_export(options: PatchOptions, *, progress: Progress | None = None) -> PatchReport:
    """Put a pruner and the GapRemap node into an ONNX export that another tool made.

    By graph passes alone: no PyTorch, and no weight is read. The export stays as it is; the bundle
    appears when complete, or not at all.

    Args:
        options: What to patch, and how.
        progress: Progress reporter.

    Raises:
        UsageError: the export cannot be patched, and why; an option or the output folder is not
            usable.
        MissingDependencyError: the ``patch`` extra is not installed.
    """
    require_extra("patch", "patching an ONNX export")
    progress = progress or SilentProgress()
    # Before onnx is imported, which takes seconds.
    found = find_export(options.export, variant=options.variant)
    check_request(options.pruning)
    if options.pruning.keep_ratio is not None:
        check_keep_ratio(options.pruning.keep_ratio)
    if options.recipe is not None:
        find_recipe(options.recipe)
    if options.out is not None:
        check_output(options.out, force=options.force)
    with progress.stage("loading onnx"):
        from gap_export.patching.patch import patch_found
    return patch_found(found, options, progress)
