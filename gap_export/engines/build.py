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
from gap_export.engines.device import find_gpu, free_memory
from gap_export.engines.folder import EngineFolder, read_engine_folder
from gap_export.engines.library import elsewhere, library_for
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
    progress = progress or SilentProgress()
    place = check_build(bundle, choice, only=only, overrides=overrides, options=options)
    graphs = target_graphs(bundle.manifest, choice.target, only)
    library = place.library
    estimate = estimate_memory(bundle, graphs, place.limits)
    here = None if library.is_rtx else find_gpu()
    for text in memory_warnings(estimate, gpu=here, free_host=free_memory()):
        warn(text)
    with _draft(bundle, choice.folder) as draft:
        kept = _keep_others(place, draft, only) if only else ()
        built = []
        for graph in graphs:
            built.append(compile_graph(place, graph, draft, options=options, progress=progress))
            # What TensorRT held for one engine is gone before the next.
            gc.collect()
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

    Returns what the engines will have in common; arguments and errors are those of
    :func:`build_engines`.
    """
    graphs = target_graphs(bundle.manifest, choice.target, only)
    for quantization in filter(None, (graph.quantization for graph in graphs)):
        choice.check_weights(quantization.dtype)
    limits = resolve_limits(bundle.manifest, overrides)
    # All components are checked: engines of different sizes cannot be used together.
    check_cache_capacity(target_graphs(bundle.manifest, choice.target), limits)
    gpu, target, generation = find_gpu(), choice.target, choice.compute_capability
    if target.built_on == "device":
        # Without its GPU there is no need to install a TensorRT.
        if gpu is None or generation not in (None, gpu.compute_capability):
            raise UsageError(
                f"engines of target {target.name} are built on the GPU they are for",
                seen=f"{gpu.name}, SM {gpu.compute_capability}"
                if gpu
                else "no NVIDIA GPU with a driver (libcuda.so.1) at hand",
                allowed=f"SM {generation}" if generation and gpu else None,
                fix=elsewhere(target),
            )
        generation = gpu.compute_capability
    assert generation is not None  # a target that is built anywhere names its generations
    library = library_for(target)
    platform = target.platform(library.release)
    assert platform is not None  # see library_for
    for graph in graphs:
        if graph.lowering not in platform.lowerings:
            raise UsageError(
                f"{library.name} {library.version} does not build the bundle's graphs for "
                f"{target.name}",
                seen=f"lowering {graph.lowering}",
                allowed=", ".join(platform.lowerings),
                fix=f"export with --lowering {platform.lowerings[0]}",
            )
    if options.weights == "stripped" and gpu is None:
        # So it is with both packages; seen with TensorRT-RTX 1.7.1.
        raise UsageError(
            f"{library.name} compiles plans without their weights on a GPU alone",
            seen="--weights stripped, and no GPU at hand",
            allowed="--weights included or streamed",
        )
    return BuildPlace(
        bundle=bundle,
        choice=choice,
        library=library,
        limits=limits,
        compute_capability=generation,
    )


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
