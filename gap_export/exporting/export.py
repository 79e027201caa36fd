"""The main job as explicit steps: recipe and checkpoint -> reference -> trace -> passes -> bundle.

Torch and what is built on it are imported inside the functions: naming the options of an export
must not cost seconds, and must work where the ``export`` extra is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gap_export.bundle import BundleDraft, write_bundle
from gap_export.checkpoint.find.source import MAIN, Checkpoint, resolve_model
from gap_export.engines.targets import TargetChoice
from gap_export.exporting.build_here import build_here, split_choices
from gap_export.exporting.describe import check_prompt, describe_bundle, describe_source
from gap_export.exporting.engine_forms import (
    GraphForm,
    choose_form,
    describe_targets,
    find_limits,
)
from gap_export.exporting.graph_cache import GraphCache
from gap_export.exporting.options import ExportOptions, ExportReport, resolve_options
from gap_export.exporting.timing import timed
from gap_export.progress import Progress, SilentProgress
from gap_export.spec.manifest import BASE, ORT, GraphSpec, Manifest, PruningSpec
from gap_export.spec.positions import Int64Array
from gap_export.spec.recipe import Recipe

if TYPE_CHECKING:
    from gap_export.exporting.place_weights import PlacedWeights, QuantizedPlaces
    from gap_export.exporting.quantization import ChannelScale
    from gap_export.families import Reference


# A CPU's casts of INT4 bundles, of the few weights that stay floats, are done when one is opened.
_FOR_GPUS = (
    "graphs of float16 are for GPUs: a CPU casts every weight at every step, and takes about twice "
    "as long a token as with float32; for a CPU add --for cpu, or --dtype int4"
)


def export_model(
    options: ExportOptions,
    *,
    progress: Progress | None = None,
    cache: GraphCache | None = None,
    warn: Callable[[str], None] | None = None,
) -> ExportReport:
    """Export a pruned model into a bundle. The bundle appears when complete, or not at all.

    Engines are built when the bundle is there; where one fails, the bundle stays.

    Args:
        options: What to export, and how.
        progress: Progress reporter.
        cache: Share one between exports of the same checkpoint to trace its decoder once.
        warn: Receives what is odd about the checkpoint or may go wrong while engines are built.

    Raises:
        UsageError: an option, the recipe, the checkpoint or the output folder is not usable.
        ExportError: tracing or a pass failed.
        EngineError: an engine could not be built.
    """
    recipe, checkpoint = resolve_model(
        options.model,
        recipe=options.recipe,
        parts=options.checkpoint,
        random_seed=options.pruning.seed if options.random_weights else None,
    )
    from gap_export.families import on_canvas

    recipe = on_canvas(recipe, options.pruning.canvas)
    return export_checkpoint(recipe, checkpoint, options, progress=progress, cache=cache, warn=warn)


def export_checkpoint(
    recipe: Recipe,
    checkpoint: Checkpoint,
    options: ExportOptions,
    *,
    progress: Progress | None = None,
    cache: GraphCache | None = None,
    warn: Callable[[str], None] | None = None,
) -> ExportReport:
    """Export a checkpoint by a recipe that the caller holds; see :func:`export_model`.

    Args:
        recipe: What the model is.
        checkpoint: Its parts.
        options: How; ``model``, ``recipe``, ``checkpoint`` and the canvas in it are not read.
        progress: Progress reporter.
        cache: Shared between exports.
        warn: Receives what is odd about the checkpoint or may go wrong while engines are built.

    Raises:
        UsageError: an option, the recipe, the checkpoint or the output folder is not usable.
        ExportError: tracing or a pass failed.
        EngineError: an engine could not be built.
    """
    progress = progress or SilentProgress()
    pruning = resolve_options(recipe, options)
    choices = options.target_choices()
    # What cannot be built after all is said now, not after minutes of work.
    to_build, prepared = split_choices(choices, options.engines.targets)
    out = options.out or Path(f"{recipe.name}-{pruning.pruner}-{pruning.keep_ratio:g}")
    seconds: dict[str, float] = {}
    with write_bundle(out, force=options.force) as draft:
        manifest = _Job(
            recipe=recipe,
            checkpoint=checkpoint,
            options=options,
            pruning=pruning,
            choices=choices,
            draft=draft,
            progress=progress,
            cache=cache or GraphCache(),
            seconds=seconds,
            warn=warn or _ignore,
        ).run()
        with timed(seconds, "commit"):
            manifest = draft.commit(manifest)
    with timed(seconds, "engines"):
        engines = build_here(out, to_build, progress=progress, warn=warn or _ignore)
    return ExportReport(
        bundle=out, manifest=manifest, seconds=seconds, engines=engines, prepared=prepared
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One export into a draft; its steps share all of this."""

    recipe: Recipe
    checkpoint: Checkpoint
    options: ExportOptions
    pruning: PruningSpec
    choices: tuple[TargetChoice, ...]
    draft: BundleDraft
    progress: Progress
    cache: GraphCache
    seconds: dict[str, float] = field(repr=False)
    warn: Callable[[str], None] = field(repr=False)

    def run(self) -> Manifest:
        """Everything but the commit; the manifest lists no files yet."""
        reference = self._reference(self.options.dtype)
        if self.options.vision_dtype is not None:
            from gap_export.exporting.quantization.tower import check_tower

            check_tower(reference.dtype)
        licensed = self.recipe.license_note
        for note in (*([licensed] if licensed else []), *reference.notes):
            self.warn(note)
        for _, path in reference.checkpoint_files:
            # In the background: gigabytes are hashed while graphs are traced.
            self.draft.hasher.start(path)
        for name, asset in reference.assets.items():
            if isinstance(asset, bytes):
                (self.draft.folder / name).write_bytes(asset)
            else:
                self.draft.place(asset, name, hold="copy")
        scales = self._calibrate(reference)
        reference = _scaled(reference, scales)
        forms = choose_form(
            self.choices, base_dtype=reference.dtype, lowering=self.options.engines.lowering
        )
        wanted = _lowerings(reference.dtype, forms.values())
        quantized = {**self._quantize(reference, wanted), **self._quantize_tower(reference)}
        placed = self._place(reference, quantized)
        manifest = self._describe(reference, placed)
        # Before the graphs, which take long: the model may be one that cannot be asked.
        manifest = self._check_prompt(manifest, reference)
        if self.options.bake_positions:
            from gap_export.exporting.baking import bake_positions

            baked = bake_positions(manifest, reference, self.draft.folder)
            manifest = replace(manifest, pruning=replace(manifest.pruning, baked_positions=baked))
        graphs = self._graphs(manifest, reference, placed, wanted, scales)
        manifest = replace(manifest, graphs=tuple(graphs))
        if self.choices:
            manifest = self._prepare_targets(manifest, forms)
        elif manifest.dtype == "float16" and self.options.quantization is None:
            self.warn(_FOR_GPUS)
        with timed(self.seconds, "hashing"):
            source = describe_source(self.draft, self.checkpoint, reference.checkpoint_files)
        return replace(manifest, source=source)

    def _reference(self, dtype: str | None) -> Reference:
        from gap_export.families import build_reference, load_family

        load_family(self.recipe, self.progress)
        with timed(self.seconds, "reference"):
            return build_reference(
                self.recipe, self.checkpoint, self.pruning, device="meta", dtype=dtype
            )

    def _describe(self, reference: Reference, placed: PlacedWeights | None) -> Manifest:
        return describe_bundle(
            self.recipe,
            self.pruning,
            reference,
            placed,
            is_quantized=self.options.quantization is not None,
        )

    def _calibrate(self, reference: Reference) -> tuple[ChannelScale, ...]:
        """What AWQ scales channels by, for references of every dtype; none for other methods."""
        quantization = self.options.quantization
        if quantization is None:
            return ()
        from gap_export.exporting.calibration import calibrate, keep_scales
        from gap_export.exporting.place_weights import check_quantization

        check_quantization(reference, quantization)
        if quantization.method != "awq":
            return ()
        with timed(self.seconds, "calibrating"):
            scales = calibrate(
                reference,
                self._describe(reference, None),
                self.draft.folder,
                self.options.calibration or (),
                block_size=quantization.block_size,
                progress=self.progress,
            )
            keep_scales(self.draft, scales)
        return scales

    def _quantize(self, reference: Reference, dtypes: Iterable[str]) -> QuantizedPlaces:
        """The decoder's quantized weights, for graphs of all these dtypes."""
        from gap_export.exporting.place_weights import quantize_weights

        if self.options.quantization is None:
            return {}
        with timed(self.seconds, "quantizing"):
            return quantize_weights(
                self.draft,
                reference,
                self.options.quantization,
                dtypes=tuple(dtypes),
                progress=self.progress,
            )

    def _quantize_tower(self, reference: Reference) -> QuantizedPlaces:
        """The tower's layers as 8-bit integers, where that is asked for."""
        from gap_export.exporting.quantization.tower import TOWER, store_tower

        if self.options.vision_dtype is None:
            return {}
        with timed(self.seconds, "quantizing"):
            return {TOWER: store_tower(self.draft, reference, progress=self.progress)}

    def _place(
        self,
        reference: Reference,
        quantized: QuantizedPlaces,
        beside: PlacedWeights | None = None,
    ) -> PlacedWeights:
        """All other weights, where the bundle may hold those of another dtype already."""
        from gap_export.exporting.place_weights import place_weights

        # Weights that came with us are small, and an update of ours would change linked ones.
        copied = self.options.copy_weights or self.recipe.checkpoint.kind == "bundled"
        with timed(self.seconds, "weights"):
            return place_weights(
                self.draft,
                reference,
                hold="copy" if copied else "link",
                progress=self.progress,
                quantized=quantized,
                beside=beside,
            )

    def _check_prompt(self, manifest: Manifest, reference: Reference) -> Manifest:
        """See that the model can be asked, and, for engines, with how long a prompt."""
        where = str(self.checkpoint.parts.get(MAIN, "the stand-in"))
        with timed(self.seconds, "prompt"):
            num_template_tokens = check_prompt(
                manifest, self.draft.folder, reference.image_token_id, where
            )
        if not self.choices:
            return manifest
        limits = find_limits(
            manifest,
            num_template_tokens=num_template_tokens,
            request=self.options.engines,
        )
        return replace(manifest, engine_limits=limits)

    def _graphs(
        self,
        manifest: Manifest,
        reference: Reference,
        placed: PlacedWeights,
        wanted: Mapping[str, Sequence[str]],
        scales: tuple[ChannelScale, ...],
    ) -> list[GraphSpec]:
        """All graphs: by dtype, by component, by lowering."""
        from gap_export.exporting.graphs import GraphWriter, decoder_limits

        graphs: list[GraphSpec] = []
        title = f"exporting {self.pruning.pruner} {self.pruning.keep_ratio:g}"
        base = placed
        writer = GraphWriter(
            folder=self.draft.folder,
            quantization=self.options.quantization,
            activations=self.options.activations,
            baked_positions=_table_of(manifest.pruning),
            attention=manifest.pruning.attention,
            limits=decoder_limits(manifest),
            seconds=self.seconds,
            cache=self.cache,
            warn=self.warn,
        )
        for dtype, lowerings in wanted.items():
            if dtype != reference.dtype:
                reference = _scaled(self._reference(dtype), scales)
                placed = self._place(reference, base.all_quantized, beside=base)
            with self.progress.stage(title, total=len(reference.components)) as advance:
                for component in reference.components:
                    graphs += writer.write(
                        component,
                        placed.of(component.weight_refs),
                        quantized=placed.quantized(component.name),
                        dtype=dtype,
                        lowerings=lowerings,
                    )
                    advance(1)
        return graphs

    def _prepare_targets(self, manifest: Manifest, forms: Mapping[str, GraphForm]) -> Manifest:
        """Verdicts on what is built elsewhere, and the instructions to build it there."""
        from gap_export.exporting.device_readme import README_NAME, device_readme

        with timed(self.seconds, "pre-flight"):
            targets = describe_targets(self.draft.folder, self.choices, forms, manifest.graphs)
        manifest = replace(manifest, targets=targets)
        wheel = None
        if self.options.engines.wheel:
            from gap_export.exporting.own_wheel import write_own_wheel

            wheel = write_own_wheel(self.draft.folder).name
        text = device_readme(manifest, self.choices, folder=self.draft.folder, wheel=wheel)
        # Where all is built by this very export, there is nothing to tell.
        if text:
            (self.draft.folder / README_NAME).write_text(text, encoding="utf-8")
        return manifest


def _lowerings(base_dtype: str, forms: Iterable[GraphForm]) -> dict[str, list[str]]:
    """For each dtype the lowerings to make; the base graphs come first.

    The form for ONNX Runtime costs some milliseconds and the bytes of a graph.
    """
    from gap_export.graph.pipelines import LOWERINGS

    own = [ORT] if base_dtype in LOWERINGS[ORT].dtypes else []
    wanted: dict[str, list[str]] = {base_dtype: [BASE, *own]}
    for form in forms:
        lowerings = wanted.setdefault(form.dtype, [])
        if form.lowering not in lowerings:
            lowerings.append(form.lowering)
    return wanted


def _table_of(pruning: PruningSpec) -> Int64Array | None:
    """The ids that a decoder holds, int64 [P], or [A, P] with several axes."""
    if not pruning.baked_positions:
        return None
    table = np.array(pruning.baked_positions, dtype=np.int64)
    return table[0] if len(table) == 1 else table


def _scaled(reference: Reference, scales: tuple[ChannelScale, ...]) -> Reference:
    """A reference with AWQ's scales folded into its decoder."""
    from gap_export.exporting.calibration import scale_decoder

    return scale_decoder(reference, scales) if scales else reference


def _ignore(text: str) -> None:
    del text
