"""Engines from a bundle: one component at a time, into a folder that appears when complete."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gap_export.bundle import Bundle
from gap_export.bundle.drafts import make_draft_folder, put_in_place, sweep_drafts, sync_tree
from gap_export.bundle.files import ENGINES_FOLDER
from gap_export.engines.compile import BuildPlace, compile_graph
from gap_export.engines.device import Gpu, find_gpu, free_memory
from gap_export.engines.folder import EngineFolder, read_engine_folder
from gap_export.engines.library import TensorRT, describe_versions, elsewhere, library_for
from gap_export.engines.memory import estimate_memory, memory_warnings
from gap_export.engines.plan import PLAN_NAME, EnginePlan, EngineSpec
from gap_export.engines.profiles import cache_capacity, check_cache_capacity
from gap_export.engines.targets import Target, TargetChoice
from gap_export.errors import BundleError, OutputError, UsageError
from gap_export.progress import Progress, SilentProgress
from gap_export.spec.manifest import EngineLimits, GraphSpec, Manifest
from gap_export.spec.requests import DEFAULT_BUILD, OWN_LIMITS, BuildOptions, LimitsRequest

Tell = Callable[[str], None]


_ALL_AT_ONCE = "build all components: leave out --only"


def build_engines(
    bundle: Bundle,
    choice: TargetChoice,
    *,
    only: tuple[str, ...] = (),
    overrides: LimitsRequest = OWN_LIMITS,
    options: BuildOptions = DEFAULT_BUILD,
    progress: Progress | None = None,
    warn: Tell = lambda _: None,
) -> EngineFolder:
    """Build a target's engines, into ``engines/<target>`` of the bundle.

    If it is stopped, the folder is there as it was before.

    Args:
        bundle: Opened, and so checked.
        choice: The target, and the GPU generation.
        only: Components; empty for all. The folder's other engines stay, if they fit.
        overrides: Sizes in place of the bundle's.
        options: How to build.
        progress: Progress reporter, a stage for each component.
        warn: Is called, before anything is built, where memory may not suffice.

    Raises:
        BundleError: the bundle was not made for the target.
        UsageError: a component or a size there is not, a GPU that is not at hand, or one that has
            not got the dtype of the weights.
        MissingDependencyError: the target's TensorRT is missing or of a version that does not fit.
        EngineError: TensorRT does not take a graph, or cannot build it.
        OutputError: the bundle cannot be written, or the disk is full.
    """
    place = check_build(bundle, choice, only=only, overrides=overrides, options=options)
    graphs = target_graphs(bundle.manifest, choice.target, only)
    library = place.library
    estimate = estimate_memory(bundle, graphs, place.limits)
    here = None if library.is_rtx else find_gpu()
    for text in memory_warnings(estimate, gpu=here, free_host=free_memory()):
        warn(text)
    with _draft(bundle, choice.folder) as draft:
        kept = _keep_others(place, draft, only) if only else ()
        built = tuple(
            _compile(place, graph, draft, options, progress or SilentProgress()) for graph in graphs
        )
        plan = EnginePlan(
            library=library.name,
            library_version=library.version,
            target=choice.target.name,
            compute_capability=place.compute_capability,
            limits=place.limits,
            engines=(*built, *kept),
        )
        (draft / PLAN_NAME).write_bytes(plan.to_json())
        sync_tree(draft, leave_out=())
        final = bundle.path / ENGINES_FOLDER / choice.folder
        put_in_place(draft, final)
    return EngineFolder(path=final, plan=plan)


def check_build(
    bundle: Bundle,
    choice: TargetChoice,
    *,
    only: tuple[str, ...] = (),
    overrides: LimitsRequest = OWN_LIMITS,
    options: BuildOptions = DEFAULT_BUILD,
) -> BuildPlace:
    """See, before anything is built, that a target's engines can be built here.

    Args:
        bundle: Opened, and so checked.
        choice: The target, and the GPU generation.
        only: Components; empty for all.
        overrides: Sizes in place of the bundle's.
        options: How to build.

    Returns:
        What the engines will have in common.

    Raises:
        BundleError: the bundle was not made for the target.
        UsageError: a component or a size there is not, a GPU that is not at hand, or one that has
            not got the dtype of the weights.
        MissingDependencyError: the target's TensorRT is missing or of a version that does not fit.
    """
    graphs = target_graphs(bundle.manifest, choice.target, only)
    for quantization in filter(None, (graph.quantization for graph in graphs)):
        choice.check_weights(quantization.dtype)
    limits = resolve_limits(bundle.manifest, overrides)
    # Of all components: engines of different sizes cannot be used together.
    check_cache_capacity(target_graphs(bundle.manifest, choice.target), limits)
    gpu = find_gpu()
    # First: without a GPU there is no need to install a TensorRT.
    if gpu is None and choice.target.built_on != "any":
        raise _needs_gpu(choice)
    library = library_for(choice.target)
    place = BuildPlace(
        bundle=bundle,
        choice=choice,
        library=library,
        limits=limits,
        compute_capability=_compute_capability(library, choice, gpu),
    )
    _check_platform(place, graphs)
    if options.weights == "stripped" and gpu is None:
        # So it is with both packages; seen with TensorRT-RTX 1.7.1.
        raise UsageError(
            f"{library.name} compiles plans without their weights on a GPU alone",
            seen="--weights stripped, and no GPU at hand",
            allowed="--weights included or streamed",
        )
    return place


def target_graphs(
    manifest: Manifest, target: Target, only: tuple[str, ...] = ()
) -> tuple[GraphSpec, ...]:
    """The graphs that a target's engines are built from.

    Args:
        manifest: The bundle's.
        target: The target.
        only: Components; empty for all.

    Raises:
        BundleError: the bundle was not made for the target.
        UsageError: no such component.
    """
    made = manifest.target(target.name)
    components = tuple(dict.fromkeys(graph.component for graph in manifest.graphs))
    unknown = [name for name in only if name not in components]
    if unknown:
        raise UsageError(
            "the bundle has no such component",
            seen=", ".join(unknown),
            allowed=", ".join(components),
        )
    return tuple(
        manifest.graph(component, lowering=made.lowering, dtype=made.dtype)
        for component in components
        if not only or component in only
    )


def resolve_limits(manifest: Manifest, overrides: LimitsRequest) -> EngineLimits:
    """The sizes to build for.

    Raises:
        BundleError: the bundle has none.
        UsageError: a size out of range.
    """
    limits = manifest.engine_limits
    if limits is None:
        raise BundleError(
            "the bundle was not made for TensorRT: it says no sizes",
            seen="no engine_limits",
            fix="export it again with --trt",
        )
    changed = {name: value for name, value in vars(overrides).items() if value is not None}
    most = manifest.decoder.max_position_embeddings
    for name, value in changed.items():
        flag = f"--{name.replace('_', '-')}" if name != "max_batch" else "--batch"
        if not 1 <= value <= most:
            raise UsageError(f"no such {flag}", seen=value, allowed=f"1..{most}")
    own, limits = limits, dataclasses.replace(limits, **changed)
    # Ids are those of the unpruned sequence: never fewer than slots, and the model has no more.
    if cache_capacity(limits) > max(most, cache_capacity(own)):
        raise UsageError(
            "prompt and answer are longer than the model's context",
            seen=f"--max-prompt {limits.max_prompt} and --max-new-tokens {limits.max_new_tokens}",
            allowed=f"{most} tokens together",
        )
    # A batch may ask of as many images; the tiles of one image stay as many as they are.
    tiled = manifest.image.tiles is not None
    images = max(limits.max_images, limits.max_batch) if tiled else limits.max_batch
    return dataclasses.replace(limits, max_images=images)


def _compute_capability(library: TensorRT, choice: TargetChoice, gpu: Gpu | None) -> int:
    """The GPU generation the engines will be for."""
    wanted = choice.compute_capability
    if library.is_rtx and wanted is not None:
        return wanted
    if gpu is None:
        raise _needs_gpu(choice)
    if wanted is not None and gpu.compute_capability != wanted:
        raise UsageError(
            f"engines of {choice.folder} are built on the GPU they are for",
            seen=f"{gpu.name}, SM {gpu.compute_capability}",
            allowed=f"SM {wanted}",
            fix=elsewhere(choice.target),
        )
    return gpu.compute_capability


def _needs_gpu(choice: TargetChoice) -> UsageError:
    return UsageError(
        f"engines of target {choice.target.name} are built on the GPU they are for",
        seen="no NVIDIA GPU with a driver (libcuda.so.1) at hand",
        fix=elsewhere(choice.target),
    )


def _check_platform(place: BuildPlace, graphs: tuple[GraphSpec, ...]) -> None:
    """The TensorRT at hand builds the lowering the bundle has for the target."""
    target, library = place.choice.target, place.library
    platform = target.platform(library.release)
    known = () if platform is None else platform.lowerings
    for graph in graphs:
        if graph.lowering not in known:
            raise UsageError(
                f"{library.name} {library.version} does not build the bundle's graphs for "
                f"{target.name}",
                seen=f"lowering {graph.lowering}",
                allowed=", ".join(known) or describe_versions(target),
                fix=f"export with --lowering {known[0]}" if known else None,
            )


def _compile(
    place: BuildPlace, graph: GraphSpec, draft: Path, options: BuildOptions, progress: Progress
) -> EngineSpec:
    """One engine; what TensorRT held for it is gone before the next."""
    try:
        return compile_graph(place, graph, draft, options=options, progress=progress)
    finally:
        gc.collect()


def _keep_others(place: BuildPlace, draft: Path, only: tuple[str, ...]) -> tuple[EngineSpec, ...]:
    """The engines of the present folder that are not built again, if it has any."""
    if not os.path.lexists(place.bundle.path / ENGINES_FOLDER / place.choice.folder):
        return ()
    try:
        present = read_engine_folder(place.bundle, place.choice.folder)
    except BundleError as err:
        raise BundleError(
            f"the other engines in {place.choice.folder} cannot stay: {err.what}",
            seen=err.seen,
            allowed=err.allowed,
            fix=_ALL_AT_ONCE,
        ) from err
    others = tuple(e for e in present.plan.engines if e.component not in only)
    plan, library = present.plan, place.library
    facts = {
        "with another TensorRT": (
            f"{plan.library} {plan.library_version}",
            f"{library.name} {library.version}",
        ),
        "for another GPU generation": (
            f"SM {plan.compute_capability}",
            f"SM {place.compute_capability}",
        ),
        "for other sizes": (_describe_limits(plan.limits), _describe_limits(place.limits)),
    }
    for name, (there, here) in facts.items():
        if others and there != here:
            raise UsageError(
                f"the other engines in {place.choice.folder} were built {name}",
                seen=there,
                allowed=here,
                fix=_ALL_AT_ONCE,
            )
    for engine in others:
        source, target = present.path / engine.file, draft / engine.file
        try:
            os.link(source, target)
        except OSError:
            # Some file systems have no hard links.
            shutil.copyfile(source, target)
    return others


def _describe_limits(limits: EngineLimits) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(limits).items())


@contextmanager
def _draft(bundle: Bundle, folder: str) -> Iterator[Path]:
    """A folder for the engines, beside the one they go to; gone afterwards in any case."""
    parent = bundle.path / ENGINES_FOLDER
    final = parent / folder
    draft, lock, made_parent = None, -1, False
    try:
        if parent.is_symlink() or final.is_symlink():
            raise OutputError("a link is in the way of the engines", seen=final)
        made_parent = not parent.is_dir()
        parent.mkdir(exist_ok=True)
        sweep_drafts(final)
        draft, lock = make_draft_folder(final)
        yield draft
    except OSError as err:
        raise OutputError(
            "the engines cannot be written",
            seen=f"{final}: {err.strerror or err}",
            fix="make room, or copy the bundle to a place that can be written; nothing "
            "half-written was left",
        ) from err
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if made_parent and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
        if lock >= 0:
            os.close(lock)
