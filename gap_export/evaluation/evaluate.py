"""How well a model grounds: unpruned, pruned with compact positions, pruned with GAP.

Every setting is asked the same questions. A compact setting is the *same graph* as the GAP one,
fed ``kept_positions = arange(P)``: nothing else differs. A misaligned setting is the graph of the
unpruned model, fed wrong positions: no token is dropped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.bundle_source import resolve_source
from gap_export.checkpoint.find.source import Checkpoint, resolve_model
from gap_export.errors import UsageError
from gap_export.evaluation.baseline import (
    activations_of,
    check_baseline,
    dtype_of,
    quantization_of,
)
from gap_export.evaluation.job import DEFAULT_ASKING, Asking, Job, ModelFacts
from gap_export.evaluation.kept_baselines import KeptBaselines
from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.refshapes import calibration_questions
from gap_export.evaluation.results import EvaluationReport
from gap_export.evaluation.settings import pruned_settings
from gap_export.evaluation.smaller_image import smaller_recipe
from gap_export.exporting import (
    ExportOptions,
    GraphCache,
    export_checkpoint,
    export_model,
    resolve_options,
)
from gap_export.families import on_canvas
from gap_export.parity.patched.check import was_patched
from gap_export.progress import Progress, SilentProgress
from gap_export.runtime.backends.onnxruntime_backend import numpy_dtype
from gap_export.runtime.session import BackendName
from gap_export.spec.manifest import PruningSpec, SourceSpec
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import DEFAULT_BACKEND, BackendOptions, PruningRequest

__all__ = ["Asking", "evaluate_bundle", "evaluate_model"]


def evaluate_model(
    options: ExportOptions,
    *,
    prunings: Sequence[PruningRequest] = (),
    num_samples: int | None = None,
    asking: Asking = DEFAULT_ASKING,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Export a model for every pruning, and measure each beside the unpruned model.

    Args:
        options: Which model, and how it is exported; its folder is not read. The seed of its
            pruning is also that of the samples and of random orders.
        prunings: What is measured; empty for the options' own. Each is measured with naive
            positions and with GAP, whichever it names.
        num_samples: Expressions to ask, the first of the data set; 0 for all; None for 500 of
            what is drawn, and all of any other.
        asking: What is asked, and how.
        progress: Progress reporter.

    Returns:
        One unpruned row, one for each misalignment, then a row for each naive baseline and a GAP
        row for every configuration, and of a model that takes any size of image one for a smaller
        image of as many visual tokens.

    Raises:
        UsageError: what ``export_model`` refuses; the data set, the protocol, the prompt, the
            records or the workers cannot be used.
    """
    progress = progress or SilentProgress()
    if options.dtype is not None:
        numpy_dtype(options.dtype)
    found, checkpoint = resolve_model(
        options.model,
        recipe=options.recipe,
        parts=options.checkpoint,
        random_seed=options.pruning.seed if options.random_weights else None,
    )
    requests = prunings or (options.pruning,)
    canvas = _one_canvas(requests)
    found = on_canvas(found, canvas)
    base = replace(options, out=None)
    runs = _settle_runs(found, base, requests)
    reads_question = any(pruning.pruner_text == "question" for pruning, _ in runs)
    seed = options.pruning.seed
    runner = RunnerOptions(prompt=asking.prompt, seed=seed, grammar=asking.grammar)
    asked = ModelFacts(
        family=found.family, prompt=found.prompt, box=found.box, reads_question=reads_question
    )
    job = Job.prepare(asking, runner, asked, num_samples, progress)
    with (
        tempfile.TemporaryDirectory(prefix="gap-export-eval-") as scratch,
        KeptBaselines(Path(scratch)) as kept,
    ):
        cache = GraphCache()
        pruned = [
            export_model(
                replace(run, out=Path(scratch) / str(number)), progress=progress, cache=cache
            ).bundle
            for number, (_, run) in enumerate(runs)
        ]
        # With all tokens in raster order nothing is pruned, in any order of the pruned ones.
        unpruned = replace(
            base,
            pruning=PruningRequest(keep_ratio=1.0, order="raster", seed=seed, canvas=canvas),
        )
        baselines = _Baselines(
            checkpoint=checkpoint,
            source=open_bundle(pruned[0]).manifest.source,
            options=unpruned,
            kept=kept,
            progress=progress,
            cache=cache,
        )
        whole = baselines.export(found, "unpruned")
        rivals = {
            path: smaller_recipe(found, pruning.num_emitted_tokens)
            for path, (pruning, _) in zip(pruned, runs, strict=True)
        }
        return job.measure(whole, pruned, progress, smaller=baselines.export_smaller(rivals))


def _one_canvas(requests: Sequence[PruningRequest]) -> str | None:
    canvas, *others = dict.fromkeys(request.canvas for request in requests)
    if others:
        raise UsageError(
            "prunings of images of several sizes are not measured beside one unpruned model",
            seen=", ".join(map(str, (canvas, *others))),
            fix="measure them one after the other",
        )
    return canvas


def _settle_runs(
    recipe: Recipe, base: ExportOptions, requests: Sequence[PruningRequest]
) -> list[tuple[PruningSpec, ExportOptions]]:
    """What is exported, each once; a slip in the last must not cost the work of the others."""
    runs: dict[tuple[str, float], tuple[PruningSpec, ExportOptions]] = {}
    for request in requests:
        run = replace(base, pruning=replace(request, positions="gap"))
        pruning = resolve_options(recipe, run)
        key = (pruning.pruner, pruning.keep_ratio)
        if runs.setdefault(key, (pruning, run))[0] != pruning:
            raise UsageError(
                "two prunings would have the same name in the report",
                seen=f"{pruning.pruner} at keep {pruning.keep_ratio:g}, twice and not alike",
                fix="measure them one after the other",
            )
    return list(runs.values())


def evaluate_bundle(
    bundle: Path,
    *,
    baseline: Path | None = None,
    checkpoint: Mapping[str, Path] | None = None,
    seed: int = 0,
    num_samples: int | None = None,
    asking: Asking = DEFAULT_ASKING,
    backend: BackendName = "onnxruntime",
    options: BackendOptions = DEFAULT_BACKEND,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure a bundle, compact and GAP, beside its unpruned model.

    Args:
        bundle: The bundle.
        baseline: A bundle of the same model with keep ratio 1.0; else the unpruned model is
            exported from the bundle's checkpoint, in the bundle's dtype and quantized as it is, so
            that pruning alone is between the two. A smaller image is measured only then, too.
        checkpoint: Parts of the source checkpoint by role, where they have been moved.
        seed: Seed of the samples and of random orders.
        num_samples: As of :func:`evaluate_model`.
        asking: What is asked, and how.
        backend: What runs the bundle; the unpruned model runs in ONNX Runtime in any case.
        options: How it runs it.
        progress: Progress reporter.

    Raises:
        UsageError: no unpruned model can be had, ``baseline`` is of another model or pruned; the
            data set, the protocol, the prompt, the records or the workers cannot be used.
    """
    progress = progress or SilentProgress()
    manifest = open_bundle(bundle).manifest
    if baseline is None and was_patched(manifest):
        raise UsageError(
            "the bundle was patched from an ONNX export: no checkpoint gives its unpruned model",
            seen="no baseline",
            fix="patch that export once more with --keep 1, and name the bundle: --baseline",
        )
    runner = RunnerOptions(
        backend=backend,
        backend_options=options,
        prompt=asking.prompt,
        seed=seed,
        grammar=asking.grammar,
    )
    asked = ModelFacts(
        family=manifest.model.family,
        prompt=manifest.prompt,
        box=manifest.box,
        reads_question=manifest.pruning.pruner_text == "question",
    )
    job = Job.prepare(asking, runner, asked, num_samples, progress)
    # What cannot run here is refused before the unpruned model is made and measured.
    with Runner(runner) as attempt:
        attempt.session(pruned_settings(bundle, manifest.pruning)[-1])
    smaller: Mapping[Path, Path] = {}
    with (
        tempfile.TemporaryDirectory(prefix="gap-export-eval-") as scratch,
        KeptBaselines(Path(scratch)) as kept,
    ):
        if baseline is None:
            recipe, source = resolve_source(manifest, checkpoint or {})
            quantization = quantization_of(manifest)
            calibrates = quantization is not None and quantization.method == "awq"
            whole = ExportOptions(
                model=recipe.name,
                pruning=PruningRequest(keep_ratio=1.0),
                dtype=dtype_of(manifest),
                quantization=quantization,
                activations=activations_of(manifest),
                vision_dtype="int8" if manifest.has_int8_tower else None,
                calibration=tuple(calibration_questions()) if calibrates else None,
            )
            baselines = _Baselines(
                checkpoint=source,
                source=manifest.source,
                options=whole,
                kept=kept,
                progress=progress,
            )
            baseline = baselines.export(recipe, "unpruned")
            rivals = {bundle: smaller_recipe(recipe, manifest.pruning.num_emitted_tokens)}
            smaller = baselines.export_smaller(rivals)
        check_baseline(manifest, open_bundle(baseline).manifest)
        return job.measure(baseline, [bundle], progress, smaller=smaller)


@dataclass(frozen=True, kw_only=True)
class _Baselines:
    """What a bundle is measured beside, exported from its checkpoint where it is not kept."""

    checkpoint: Checkpoint
    source: SourceSpec
    options: ExportOptions
    kept: KeptBaselines
    progress: Progress
    cache: GraphCache = field(default_factory=GraphCache)

    def export(self, recipe: Recipe, name: str) -> Path:
        """The unpruned bundle of a recipe."""

        def make(out: Path) -> Path:
            options = replace(self.options, out=out)
            return export_checkpoint(
                recipe, self.checkpoint, options, progress=self.progress, cache=self.cache
            ).bundle

        return self.kept.find_or_make(recipe, self.source, self.options, name, make)

    def export_smaller(self, rivals: Mapping[Path, Recipe | None]) -> dict[Path, Path]:
        """Export each smaller image's model once: by pruned bundle."""
        found: dict[Path, Path] = {}
        by_name: dict[str, Path] = {}
        for path, recipe in rivals.items():
            if recipe is None:
                continue
            name = f"smaller-image-{recipe.image.width}x{recipe.image.height}"
            if name not in by_name:
                by_name[name] = self.export(recipe, name)
            found[path] = by_name[name]
        return found
