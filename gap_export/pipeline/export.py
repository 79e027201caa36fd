"""The main job as explicit steps: recipe and checkpoint -> reference -> trace -> passes -> bundle.

Torch and what is built on it are imported inside the functions: naming the options of an export
must not cost seconds, and must work where the ``export`` extra is missing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export.bundle import BundleDraft, write_bundle
from gap_export.errors import BundleError, CheckpointError, ExpressionError
from gap_export.manifest import (
    GraphSpec,
    Manifest,
    ModelSpec,
    PruningSpec,
    SourceFile,
    SourcePart,
    SourceSpec,
    TensorPlace,
)
from gap_export.pipeline.graph_cache import GraphCache
from gap_export.pipeline.options import ExportOptions, ExportReport, resolve_options
from gap_export.pipeline.timing import timed
from gap_export.progress import Progress, SilentProgress
from gap_export.recipe import Recipe
from gap_export.source import MAIN, Checkpoint, resolve_model
from gap_export.version import __version__

if TYPE_CHECKING:
    from gap_export.families import Reference
    from gap_export.pipeline.place_weights import PlacedWeights

# Stands for every expression: what the model cannot be asked with it, it cannot be asked at all.
_PROBE = "object"
_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
_OPSET = 20


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
    recipe, checkpoint = resolve_model(
        options.model,
        recipe=options.recipe,
        parts=options.checkpoint,
        random_seed=options.seed if options.random_weights else None,
    )
    return export_checkpoint(recipe, checkpoint, options, progress=progress, cache=cache)


def export_checkpoint(
    recipe: Recipe,
    checkpoint: Checkpoint,
    options: ExportOptions,
    *,
    progress: Progress | None = None,
    cache: GraphCache | None = None,
) -> ExportReport:
    """Export a checkpoint by a recipe that the caller holds; see :func:`export_model`.

    Args:
        recipe: What the model is.
        checkpoint: Its parts.
        options: How; ``model``, ``recipe`` and ``checkpoint`` in it are not read.
        progress: Told what is done.
        cache: Shared between exports.

    Raises:
        UsageError: an option, the recipe, the checkpoint or the output folder is not usable.
        ExportError: tracing or a pass failed.
    """
    progress = progress or SilentProgress()
    pruning = resolve_options(recipe, options)
    from gap_export.families import build_reference
    from gap_export.pipeline.graphs import add_graph
    from gap_export.pipeline.place_weights import place_weights

    out = options.out or Path(f"{recipe.name}-{pruning.pruner}-{pruning.keep_ratio:g}")
    seconds: dict[str, float] = {}
    cache = cache or GraphCache()
    with write_bundle(out, force=options.force) as draft:
        with timed(seconds, "reference"):
            reference = build_reference(
                recipe, checkpoint, pruning, device="meta", dtype=options.dtype
            )
        for _, path in reference.checkpoint_files:
            # In the background: gigabytes are hashed while graphs are traced.
            draft.hasher.start(path)
        with timed(seconds, "weights"):
            placed = place_weights(
                draft,
                reference,
                hold="copy" if options.copy_weights or _is_bundled(recipe) else "link",
                progress=progress,
            )
            for name, asset in reference.assets.items():
                _add_asset(draft, name, asset)
        manifest = _describe(recipe, pruning, reference, placed)
        # Before the graphs: nobody should wait for those of a model that cannot be asked.
        with timed(seconds, "prompt"):
            _check_prompt(manifest, draft.folder, reference.image_token_id, _where(checkpoint))
        graphs: list[GraphSpec] = []
        title = f"exporting {pruning.pruner} {pruning.keep_ratio:g}"
        with progress.stage(title, total=len(reference.components)) as advance:
            for component in reference.components:
                graphs.append(
                    add_graph(
                        draft.folder,
                        component,
                        placed.of(component.weight_refs),
                        dtype=reference.dtype,
                        seconds=seconds,
                        cache=cache,
                    )
                )
                advance(1)
        with timed(seconds, "hashing"):
            source = _source_spec(draft, checkpoint, reference.checkpoint_files)
        with timed(seconds, "commit"):
            manifest = draft.commit(replace(manifest, graphs=tuple(graphs), source=source))
    return ExportReport(bundle=out, manifest=manifest, seconds=seconds)


def _is_bundled(recipe: Recipe) -> bool:
    """Weights that came with us are small, and an update of ours would change linked ones."""
    return recipe.checkpoint.kind == "bundled"


def _add_asset(draft: BundleDraft, name: str, asset: Path | bytes) -> None:
    if isinstance(asset, bytes):
        (draft.folder / name).write_bytes(asset)
    else:
        draft.place(asset, name, hold="copy")


def _where(checkpoint: Checkpoint) -> str:
    return str(checkpoint.parts.get(MAIN, "the stand-in"))


def _check_prompt(manifest: Manifest, assets: Path, image_token_id: int | None, where: str) -> None:
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
            f"no prompt can be made with the tokenizer of {where} and recipe {manifest.model.name}",
            seen=err.what if err.seen is None else f"{err.what}: {err.seen}",
            allowed=err.allowed,
            fix="restore the checkpoint's tokenizer.json, or correct the recipe's prompt",
        ) from err
    if prompts.image_token_id is not None and prompts.image_token_id != image_token_id:
        raise CheckpointError(
            f"{where}: config.json and tokenizer.json disagree on the image token "
            f"{manifest.prompt.image_token}",
            seen=f"image_token_index {image_token_id}",
            allowed=f"{prompts.image_token_id}, the tokenizer's id",
            fix="use the files that belong together",
        )
    largest = int(max([*encoded.prefix_ids, *encoded.suffix_ids]))
    if largest >= manifest.decoder.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer gives ids that the model has not got",
            seen=largest,
            allowed=f"0..{manifest.decoder.vocab_size - 1}",
            fix="use the tokenizer.json that belongs to these weights",
        )


def _source_spec(
    draft: BundleDraft, checkpoint: Checkpoint, files: Iterable[tuple[str, Path]]
) -> SourceSpec:
    """Where the weights are from; waits for the hashes."""
    parts: list[SourcePart] = []
    by_role: dict[str, list[Path]] = {}
    for role, path in files:
        by_role.setdefault(role, []).append(path)
    for role, paths in by_role.items():
        place = checkpoint.parts[role]
        folder = place if place.is_dir() else place.parent
        listed = [
            SourceFile(
                path=path.relative_to(folder).as_posix(),
                size=path.stat().st_size,
                sha256=draft.hasher.sha256(path),
            )
            for path in sorted(set(paths))
        ]
        parts.append(SourcePart(role=role, location=str(folder.resolve()), files=tuple(listed)))
    return SourceSpec(parts=tuple(parts), random_seed=checkpoint.random_seed)


def _describe(
    recipe: Recipe, pruning: PruningSpec, reference: Reference, placed: PlacedWeights
) -> Manifest:
    """All that is known before the graphs are made."""
    return Manifest(
        model=ModelSpec(
            name=recipe.name, family=recipe.family, summary=recipe.summary, license=recipe.license
        ),
        source=SourceSpec(parts=()),
        pruning=pruning,
        grid=recipe.grid,
        image=recipe.image,
        prompt=recipe.prompt,
        box=recipe.box,
        text_encoder=reference.text_encoder_spec,
        decoder=reference.decoder_spec,
        newline=_newline_place(reference, placed),
        dtype=reference.dtype,
        opset=_OPSET,
        graphs=(),
        files=(),
        tools=_tool_versions(),
    )


def _newline_place(reference: Reference, placed: PlacedWeights) -> TensorPlace | None:
    if reference.newline_weight is None:
        return None
    place = placed.of({"newline": reference.newline_weight})["newline"]
    return TensorPlace(
        file=place.location, offset=place.offset, dtype=reference.dtype, shape=place.shape
    )


def _tool_versions() -> dict[str, str]:
    found = {"gap-export": __version__, "python": platform.python_version()}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
