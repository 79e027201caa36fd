"""The last step of an export: the engines that this machine can build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gap_export.bundle import open_bundle
from gap_export.engines.build import build_engines
from gap_export.engines.device import find_gpu
from gap_export.engines.folder import EngineFolder
from gap_export.engines.library import elsewhere, library_for
from gap_export.engines.targets import AUTO, TargetChoice
from gap_export.errors import GapExportError, MissingDependencyError
from gap_export.progress import Progress


def split_choices(
    choices: Sequence[TargetChoice], specs: Sequence[str]
) -> tuple[tuple[TargetChoice, ...], dict[str, str]]:
    """Which targets are built here; and for the others, why they are only prepared.

    Args:
        choices: What ``specs`` stand for.
        specs: What the user wrote: a target named there that any machine could build is not left
            out without an error; ``auto`` leaves out what it must.

    Returns:
        The choices to build, and by target folder the reason for each that is not.

    Raises:
        MissingDependencyError: a named target's TensorRT is not installed here, or too old or new.
    """
    here: list[TargetChoice] = []
    prepared: dict[str, str] = {}
    for choice in choices:
        reason = _why_not(choice, optional=AUTO in specs or choice.target.built_on == "device")
        if reason is None:
            here.append(choice)
        else:
            prepared[choice.folder] = reason
    return tuple(here), prepared


def build_here(
    bundle: Path,
    choices: Sequence[TargetChoice],
    *,
    progress: Progress,
    warn: Callable[[str], None],
) -> tuple[EngineFolder, ...]:
    """Build engines from a finished bundle, one target after the other.

    Args:
        bundle: Its folder.
        choices: From :func:`split_choices`.
        progress: Progress reporter.
        warn: Receives what may go wrong for want of memory.

    Raises:
        EngineError: TensorRT does not take a graph, or cannot build it.
        OutputError: the bundle cannot be written.
    """
    if not choices:
        return ()
    opened = open_bundle(bundle)
    built = []
    for choice in choices:
        try:
            built.append(build_engines(opened, choice, progress=progress, warn=warn))
        except GapExportError:
            warn(
                f"the bundle itself is complete: {bundle}; when this is mended, go on with: "
                f"gap-export build {bundle} --target {choice.spec}"
            )
            raise
    return tuple(built)


def _why_not(choice: TargetChoice, *, optional: bool) -> str | None:
    """Why a target cannot be built here; None where it can.

    Raises:
        MissingDependencyError: what builds it is missing, and it is not optional.
    """
    target = choice.target
    if target.built_on == "device":
        gpu = find_gpu()
        wanted = choice.compute_capability
        if gpu is None or wanted not in (None, gpu.compute_capability):
            seen = "no GPU here" if gpu is None else f"the GPU here is {gpu.name}"
            return f"{seen}; {elsewhere(target)}"
    try:
        library_for(target)
    except MissingDependencyError as err:
        if not optional:
            raise
        return str(err)
    return None
