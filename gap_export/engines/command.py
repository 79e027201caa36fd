"""What ``gap-export build`` and ``python -m gap_export.engines build`` both do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gap_export.bundle import open_bundle
from gap_export.engines.build import Tell, build_engines, check_build
from gap_export.engines.folder import EngineFolder
from gap_export.engines.targets import parse_targets
from gap_export.progress import Progress
from gap_export.spec.requests import BuildOptions, LimitsRequest


def run_build(
    bundle: Path,
    targets: Sequence[str],
    *,
    only: Sequence[str],
    overrides: LimitsRequest,
    options: BuildOptions,
    progress: Progress,
    warn: Tell,
) -> list[EngineFolder]:
    """Build the engines of some targets from a bundle.

    Args:
        bundle: The bundle's folder; every byte of it is hashed first.
        targets: What the user wrote, e.g. ``rtx:sm89``.
        only: Components; empty for all.
        overrides: Sizes in place of the bundle's.
        options: How to build.
        progress: Progress reporter, a stage for each component.
        warn: Is called with a sentence where memory may not suffice.

    Returns:
        A folder for each target and GPU generation, in the order given.

    Raises:
        GapExportError: see :func:`gap_export.engines.build.build_engines`.
    """
    choices = parse_targets(targets)
    opened, components = open_bundle(bundle, verify="full"), tuple(only)
    # All of them now: a slip in the last must not cost the minutes of those before it.
    for choice in choices:
        check_build(opened, choice, only=components, overrides=overrides, options=options)
    return [
        build_engines(
            opened,
            choice,
            only=components,
            overrides=overrides,
            options=options,
            progress=progress,
            warn=warn,
        )
        for choice in choices
    ]


def describe_folders(folders: Sequence[EngineFolder]) -> list[dict[str, Any]]:
    """What was built, as JSON data: one entry an engine."""
    return [
        {
            "folder": folder.path.name,
            "component": engine.component,
            "file": str(folder.path / engine.file),
            "size_bytes": engine.size,
            "weights": engine.weights,
            "build_seconds": engine.build_seconds,
            "peak_memory_bytes": engine.peak_memory_bytes,
            "library": f"{folder.plan.library} {folder.plan.library_version}",
        }
        for folder in folders
        for engine in folder.plan.engines
    ]
