"""The main job as explicit steps: recipe and checkpoint -> reference -> trace -> passes -> bundle.

Torch and what is built on it are imported inside the functions: naming the options of an export
must not cost seconds, and must work where the ``export`` extra is missing.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gap_export.bundle import write_bundle
from gap_export.errors import BundleError, CheckpointError, ExpressionError
from gap_export.extras import require_extra
from gap_export.manifest import (
    GraphSpec,
    Manifest,
    ModelSpec,
    PruningSpec,
    SourceFile,
    SourceSpec,
)
from gap_export.positions import PositionMode
from gap_export.progress import Progress, SilentProgress
from gap_export.recipe import Recipe
from gap_export.source import hash_file, resolve_model
from gap_export.version import __version__

if TYPE_CHECKING:
    from gap_export.families import Component, Reference

OPSET = 20
DTYPE = "float32"
# Stands for every expression: what the model cannot be asked with it, it cannot be asked at all.
_PROBE = "object"
_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        model: Recipe name, alias, or a checkpoint folder.
        keep_ratio: Share of the visual tokens to keep, in (0, 1]; None for the recipe's default.
        pruner: Name; None for the recipe's default.
        order: ``raster``: kept tokens ascend; ``score``: best first.
        positions: ``gap``, or ``compact`` for the naive baseline.
        seed: For pruners that draw.
        out: Bundle folder; None for ``./<model>-<pruner>-<keep>``.
        force: Replace a bundle that is already there. Other folders are never replaced.
        recipe: Recipe for a checkpoint folder that has no recipe.yaml of its own.
    """

    model: str
    keep_ratio: float | None = None
    pruner: str | None = None
    order: Literal["raster", "score"] = "raster"
    positions: PositionMode = "gap"
    seed: int = 0
    out: Path | None = None
    force: bool = False
    recipe: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export left behind.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        seconds: Wall time of each step.
    """

    bundle: Path
    manifest: Manifest
    seconds: dict[str, float]

    def to_plain(self) -> dict[str, Any]:
        """JSON form."""
        pruning = self.manifest.pruning
        return {
            "bundle": str(self.bundle),
            "model": self.manifest.model.name,
            "pruner": pruning.pruner,
            "positions": pruning.positions,
            "keep_ratio": pruning.keep_ratio,
            "num_visual_tokens": pruning.num_visual_tokens,
            "num_kept_tokens": pruning.num_kept_tokens,
            "graphs": [graph.file for graph in self.manifest.graphs],
            "size_bytes": sum(f.size for f in self.manifest.files),
            "seconds": self.seconds,
        }


class GraphCache:
    """Graphs that do not depend on the pruning, kept between exports of one process.

    Only the vision encoder prunes: exports that differ in pruner or keep ratio share the rest.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[str, ...], tuple[bytes, GraphSpec]] = {}

    def get(self, key: tuple[str, ...]) -> tuple[bytes, GraphSpec] | None:
        """The bytes of an ONNX file and its description, if the key was met before."""
        return self._graphs.get(key)

    def put(self, key: tuple[str, ...], file: bytes, spec: GraphSpec) -> None:
        """Keep a graph."""
        self._graphs[key] = file, spec


def export_model(
    options: ExportOptions,
    *,
    progress: Progress | None = None,
    cache: GraphCache | None = None,
) -> ExportReport:
    """Export a pruned model into a bundle. The bundle appears when complete, or not at all.

    Args:
        options: What to export, and how.
        progress: Told what is done.
        cache: Share one between exports of the same checkpoint to trace its decoder once.

    Raises:
        UsageError: an option, the recipe, the checkpoint or the output folder is not usable.
        ExportError: tracing or a pass failed.
    """
    recipe, checkpoint = resolve_model(options.model, options.recipe)
    return export_checkpoint(recipe, checkpoint, options, progress=progress, cache=cache)


def export_checkpoint(
    recipe: Recipe,
    checkpoint: Path,
    options: ExportOptions,
    *,
    progress: Progress | None = None,
    cache: GraphCache | None = None,
) -> ExportReport:
    """Export a checkpoint by a recipe that the caller holds; see :func:`export_model`.

    Args:
        recipe: What the model is.
        checkpoint: Its folder.
        options: How; ``model`` and ``recipe`` in it are not read.
        progress: Told what is done.
        cache: Shared between exports.

    Raises:
        UsageError: an option, the recipe, the checkpoint or the output folder is not usable.
        ExportError: tracing or a pass failed.
    """
    progress = progress or SilentProgress()
    pruning = resolve_options(recipe, options)
    from gap_export.families import build_reference

    out = options.out or Path(f"{recipe.name}-{pruning.pruner}-{pruning.keep_ratio:g}")
    seconds: dict[str, float] = {}
    cache = cache or GraphCache()
    with write_bundle(out, force=options.force) as draft:
        with _timed(seconds, "reference"):
            reference = build_reference(recipe, checkpoint, pruning, device="meta")
        with _timed(seconds, "weights"):
            for source, name in (*reference.weight_files.items(), *reference.tokenizer_files):
                draft.copy(source, name)
        with _timed(seconds, "hashing"):
            manifest = _describe(recipe, checkpoint, pruning, reference)
        # Before the graphs: nobody should wait for those of a model that cannot be asked.
        with _timed(seconds, "prompt"):
            _check_prompt(manifest, draft.folder, checkpoint, reference.image_token_id)
        graphs: list[GraphSpec] = []
        title = f"exporting {pruning.pruner} {pruning.keep_ratio:g}"
        with progress.stage(title, total=len(reference.components)) as advance:
            for component in reference.components:
                graphs.append(
                    _add_graph(draft.folder, component, reference.weight_files, seconds, cache)
                )
                advance(1)
        with _timed(seconds, "commit"):
            manifest = draft.commit(replace(manifest, graphs=tuple(graphs)))
    return ExportReport(bundle=out, manifest=manifest, seconds=seconds)


def resolve_options(recipe: Recipe, options: ExportOptions) -> PruningSpec:
    """What the options mean for a model; nothing is exported yet.

    Raises:
        UsageError: an option is out of range, or the model cannot serve the pruner.
        MissingDependencyError: the ``export`` extra is not installed.
    """
    require_extra("export", "exporting a model")
    from gap_export.families import resolve_pruning

    return resolve_pruning(
        recipe,
        pruner=options.pruner,
        keep_ratio=options.keep_ratio,
        order=options.order,
        positions=options.positions,
        seed=options.seed,
    )


def _check_prompt(manifest: Manifest, assets: Path, checkpoint: Path, image_token_id: int) -> None:
    """Ask for something, as a user of the bundle will, and see that the model can read it.

    Raises:
        CheckpointError: a tokenizer is broken, or it, the config and the recipe do not fit.
    """
    from gap_export.runtime.prompt import PromptEncoder

    try:
        prompts = PromptEncoder(manifest, assets)
        encoded = prompts.encode(_PROBE)
    except (BundleError, ExpressionError) as err:
        raise CheckpointError(
            f"no prompt can be made with the tokenizer of {checkpoint} and recipe "
            f"{manifest.model.name}",
            seen=err.what if err.seen is None else f"{err.what}: {err.seen}",
            allowed=err.allowed,
            fix="restore the checkpoint's tokenizer.json, or correct the recipe's prompt",
        ) from err
    if prompts.image_token_id != image_token_id:
        raise CheckpointError(
            f"{checkpoint}: config.json and tokenizer.json disagree on the image token "
            f"{manifest.prompt.image_token}",
            seen=f"image_token_index {image_token_id}",
            allowed=f"{prompts.image_token_id}, the tokenizer's id",
            fix="use the files that belong together",
        )
    largest = int(max([*encoded.prefix_ids, *encoded.suffix_ids]))
    if largest >= manifest.decoder.vocab_size:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer gives ids that the model has not got",
            seen=largest,
            allowed=f"0..{manifest.decoder.vocab_size - 1}",
            fix="use the tokenizer.json that belongs to these weights",
        )


def _add_graph(
    folder: Path,
    component: Component,
    weight_files: Mapping[Path, str],
    seconds: dict[str, float],
    cache: GraphCache,
) -> GraphSpec:
    """Write one component's graph into the bundle's folder."""
    file = f"{component.name}.onnx"
    sources = sorted({str(ref.file) for ref in component.weight_refs.values()})
    key = (component.name, *sources)
    known = None if component.prunes else cache.get(key)
    if known is not None:
        (folder / file).write_bytes(known[0])
        return known[1]
    spec = _trace_graph(folder / file, component, weight_files, seconds)
    if not component.prunes:
        cache.put(key, (folder / file).read_bytes(), spec)
    return spec


def _trace_graph(
    path: Path,
    component: Component,
    weight_files: Mapping[Path, str],
    seconds: dict[str, float],
) -> GraphSpec:
    from gap_export.passes import PIPELINES, run_pipeline
    from gap_export.trace import describe_interface, save_graph, trace_component

    with _timed(seconds, f"trace {component.name}"):
        model = trace_component(component, opset=OPSET, locations=weight_files)
    with _timed(seconds, f"passes {component.name}"):
        run_pipeline(model, PIPELINES[component.name])
        save_graph(model, path)
    inputs, outputs = describe_interface(model)
    return GraphSpec(
        component=component.name,
        lowering="onnxruntime",
        dtype=DTYPE,
        kv_contract=component.kv_contract,
        file=path.name,
        inputs=inputs,
        outputs=outputs,
    )


def _describe(
    recipe: Recipe,
    checkpoint: Path,
    pruning: PruningSpec,
    reference: Reference,
) -> Manifest:
    """All that is known before the graphs are made."""
    files = [
        SourceFile(
            path=path.relative_to(checkpoint).as_posix(),
            size=path.stat().st_size,
            sha256=hash_file(path),
        )
        for path in sorted(set(reference.checkpoint_files))
    ]
    return Manifest(
        model=ModelSpec(
            name=recipe.name, family=recipe.family, summary=recipe.summary, license=recipe.license
        ),
        source=SourceSpec(location=str(checkpoint.resolve()), files=tuple(files)),
        pruning=pruning,
        grid=recipe.grid,
        image=recipe.image,
        prompt=recipe.prompt,
        box=recipe.box,
        text_encoder=reference.text_encoder_spec,
        decoder=reference.decoder_spec,
        dtype=DTYPE,
        opset=OPSET,
        graphs=(),
        files=(),
        tools=_tool_versions(),
    )


def _tool_versions() -> dict[str, str]:
    found = {"gap-export": __version__, "python": platform.python_version()}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 3)
