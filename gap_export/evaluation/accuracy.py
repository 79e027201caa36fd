"""Acc@0.5 of a model or a bundle: unpruned, pruned with compact positions, pruned with GAP.

All three rows come from ONNX Runtime sessions over the same samples. The compact row is the *same
graph* as the GAP row, fed ``kept_positions = arange(P)``: nothing else differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from gap_export.bundle import open_bundle
from gap_export.errors import OutputError, UsageError
from gap_export.evaluation.calibration import refshapes_questions
from gap_export.evaluation.refshapes import Sample, iter_samples
from gap_export.manifest import Manifest, QuantizationSpec, SourceFile
from gap_export.parity.metrics import accuracy_at, intersection_over_union, wilson_interval
from gap_export.pipeline import (
    DTYPES,
    Dtype,
    ExportOptions,
    GraphCache,
    export_checkpoint,
    export_model,
    resolve_options,
)
from gap_export.positions import PositionMode
from gap_export.progress import Progress, SilentProgress
from gap_export.runtime.drawing import draw_grounding, save_drawing
from gap_export.runtime.session import BackendName, GroundingSession
from gap_export.source import MAIN, resolve_model, resolve_source

MIN_SAMPLES = 1
_Open = Callable[[PositionMode], GroundingSession]


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """One measured configuration.

    Attributes:
        model: Recipe name.
        pruner: Its name, or ``none`` for the unpruned row.
        keep_ratio: 1.0 for the unpruned row.
        positions: ``none`` (nothing was pruned), ``compact`` or ``gap``.
        seed: Seed of the samples (and of pruners that draw).
        n: Expressions asked.
        num_images: Pictures they were asked about.
        acc_at_50: Share of expressions answered with IoU > 0.5, in 0..1.
        ci95: 95 % Wilson interval of it.
        mean_iou: Mean IoU, unparsable answers counted as 0.
        recovered: acc_at_50 divided by the unpruned row's; None for that row itself, or if it is 0.
        mean_visual_tokens: Visual tokens the decoder read of a picture, an extra one included; the
            mean over the expressions.
    """

    model: str
    pruner: str
    keep_ratio: float
    positions: Literal["none", "compact", "gap"]
    seed: int
    n: int
    num_images: int
    acc_at_50: float
    ci95: tuple[float, float]
    mean_iou: float
    recovered: float | None
    mean_visual_tokens: float


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The rows, unpruned first."""

    rows: tuple[AccuracyRow, ...]

    def to_plain(self) -> dict[str, Any]:
        """JSON form: ``{"rows": [...]}``, accuracies in 0..1."""
        return {"rows": [asdict(row) for row in self.rows]}

    def worst_recovery(self) -> float | None:
        """Smallest share of the unpruned accuracy that GAP recovered, over the GAP rows."""
        shares = [
            r.recovered for r in self.rows if r.positions == "gap" and r.recovered is not None
        ]
        return min(shares, default=None)


def evaluate_model(
    options: ExportOptions,
    *,
    pruners: Sequence[str] = (),
    keep_ratios: Sequence[float] = (),
    num_samples: int = 500,
    pictures: Path | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Export a model at every (pruner, keep ratio), and measure each beside the unpruned model.

    Args:
        options: Which model, and how it is exported. Its seed is also that of the RefShapes
            samples; its pruner, keep ratio, positions and folder are not read.
        pruners: Names; empty for the recipe's default.
        keep_ratios: In (0, 1]; empty for the recipe's default.
        num_samples: Expressions to ask.
        pictures: A folder that is made, for a drawing of each row's first answer: box, kept tokens
            and, where the pruner has scores, their heat map.
        progress: Told what is done.

    Returns:
        One unpruned row, then a compact and a GAP row for every configuration.

    Raises:
        UsageError: what ``export_model`` refuses, or fewer samples than 1.
    """
    _check_samples(num_samples)
    progress = progress or SilentProgress()
    found, _ = resolve_model(options.model, recipe=options.recipe, parts=options.checkpoint)
    seed = options.seed
    base = replace(options, pruner=None, keep_ratio=None, positions="gap", out=None)
    runs = [
        replace(base, pruner=pruner, keep_ratio=keep_ratio)
        for keep_ratio in keep_ratios or (found.defaults.keep_ratio,)
        for pruner in pruners or (found.defaults.pruner,)
    ]
    for run in runs:
        # All of them now: a slip in the last must not cost the measuring of those before it.
        resolve_options(found, run)
    samples = list(iter_samples(seed=seed, num_samples=num_samples))
    with tempfile.TemporaryDirectory(prefix="gap-export-eval-") as scratch:
        cache = GraphCache()
        # Whatever order the others have: with all tokens in raster order nothing is pruned.
        unpruned = replace(
            base,
            keep_ratio=1.0,
            order="raster",
            extra_token=None,
            budget=None,
            out=Path(scratch) / "unpruned",
        )
        whole = export_model(unpruned, progress=progress, cache=cache)
        open_whole = _opener(whole.bundle)
        rows = [_measure(open_whole, None, samples, seed, progress, None)]
        if pictures is not None:
            _draw(open_whole, None, samples[0], pictures)
        for number, run in enumerate(runs):
            out = Path(scratch) / str(number)
            pruned = export_model(replace(run, out=out), progress=progress, cache=cache)
            open_pruned = _opener(pruned.bundle)
            rows += _pruned_rows(open_pruned, samples, seed, progress, rows[0].acc_at_50)
            if pictures is not None:
                _draw_pruned(open_pruned, samples[0], pictures)
    return EvaluationReport(rows=tuple(rows))


def evaluate_bundle(
    bundle: Path,
    *,
    baseline: Path | None = None,
    checkpoint: Mapping[str, Path] | None = None,
    seed: int = 0,
    num_samples: int = 500,
    pictures: Path | None = None,
    backend: BackendName = "onnxruntime",
    engines: str | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure a bundle, compact and GAP, beside its unpruned model.

    Args:
        bundle: The bundle.
        baseline: A bundle of the same model with keep ratio 1.0; else the unpruned model is
            exported from the bundle's checkpoint, in the bundle's dtype and quantized as it is, so
            that pruning alone is between the two.
        checkpoint: Parts of the source checkpoint by role, where they have been moved.
        seed: Of the RefShapes samples.
        num_samples: Expressions to ask.
        pictures: A folder that is made, for a drawing of each row's first answer: box, kept tokens
            and, where the pruner has scores, their heat map.
        backend: What runs the bundle; the unpruned model runs in ONNX Runtime in any case.
        engines: With TensorRT: which of the bundle's engines.
        progress: Told what is done.

    Raises:
        UsageError: no unpruned model can be had, or ``baseline`` is of another model or pruned.
    """
    _check_samples(num_samples)
    progress = progress or SilentProgress()
    samples = list(iter_samples(seed=seed, num_samples=num_samples))
    manifest = open_bundle(bundle).manifest
    open_pruned = _opener(bundle, backend, engines)
    # What cannot run here is refused before the unpruned model is made and measured.
    with open_pruned("gap"):
        pass
    with tempfile.TemporaryDirectory(prefix="gap-export-eval-") as scratch:
        if baseline is None:
            recipe, source = resolve_source(manifest, checkpoint or {})
            quantization = _quantization_of(manifest)
            calibrates = quantization is not None and quantization.method == "awq"
            options = ExportOptions(
                model=recipe.name,
                keep_ratio=1.0,
                dtype=_dtype_of(manifest),
                quantization=quantization,
                calibration=tuple(refshapes_questions()) if calibrates else None,
                out=Path(scratch) / "unpruned",
            )
            baseline = export_checkpoint(recipe, source, options, progress=progress).bundle
        _check_baseline(manifest, open_bundle(baseline).manifest)
        open_whole = _opener(baseline)
        whole = _measure(open_whole, None, samples, seed, progress, None)
        if pictures is not None:
            _draw(open_whole, None, samples[0], pictures)
            _draw_pruned(open_pruned, samples[0], pictures)
    return EvaluationReport(
        rows=(whole, *_pruned_rows(open_pruned, samples, seed, progress, whole.acc_at_50))
    )


def _check_baseline(manifest: Manifest, baseline: Manifest) -> None:
    """Refuse a baseline that is not the same model with all its tokens.

    Raises:
        UsageError: another model, other weights, other preparation, or pruned.
    """
    mine, theirs = _source_files(manifest), _source_files(baseline)
    # A pruner that reads the text brings files of its own; what both have must be the same.
    common = mine.keys() & theirs.keys()
    other_files = sorted(path for path in common if mine[path].sha256 != theirs[path].sha256)
    facts = ("model", "grid", "image", "prompt", "box", "decoder", "dtype")
    other_facts = [name for name in facts if getattr(manifest, name) != getattr(baseline, name)]
    seen = [
        *(f"another {name}" for name in other_facts),
        *(f"another {path}" for path in other_files),
    ]
    if _quantization_of(manifest) != _quantization_of(baseline):
        seen.append("another quantization")
    if manifest.source.random_seed != baseline.source.random_seed:
        seen.append("other random weights")
    elif manifest.source.random_seed is None and not common:
        seen.append("no common weights")
    if baseline.pruning.keep_ratio != 1.0:
        seen.append(f"keep {baseline.pruning.keep_ratio:g}")
    if baseline.pruning.order != "raster" or baseline.pruning.positions != "gap":
        seen.append(f"{baseline.pruning.order} order, {baseline.pruning.positions} positions")
    if seen:
        raise UsageError(
            "the baseline is not the unpruned form of this bundle's model",
            seen="; ".join(seen),
            allowed=f"{manifest.model.name} at keep 1, made from the same checkpoint",
            fix=f"make one with: gap-export {manifest.model.name} --keep 1",
        )


def _source_files(manifest: Manifest) -> dict[str, SourceFile]:
    """Files of the checkpoint by ``role/path``; by the path alone in the main part."""
    return {
        file.path if part.role == MAIN else f"{part.role}/{file.path}": file
        for part in manifest.source.parts
        for file in part.files
    }


def _quantization_of(manifest: Manifest) -> QuantizationSpec | None:
    """Of those weights that are quantized; None where none are."""
    return next((graph.quantization for graph in manifest.graphs if graph.quantization), None)


def _dtype_of(manifest: Manifest) -> Dtype:
    (found,) = [dtype for dtype in DTYPES if dtype == manifest.dtype]
    return found


def _check_samples(num_samples: int) -> None:
    if num_samples < MIN_SAMPLES:
        raise UsageError("too few samples", seen=num_samples, allowed=f">= {MIN_SAMPLES}")


def _opener(
    bundle: Path, backend: BackendName = "onnxruntime", engines: str | None = None
) -> _Open:
    """How a bundle is opened to be measured, with the positions of the row."""

    def open_with(positions: PositionMode) -> GroundingSession:
        return GroundingSession.open(bundle, backend=backend, engines=engines, positions=positions)

    return open_with


def _pruned_rows(
    open_session: _Open, samples: list[Sample], seed: int, progress: Progress, unpruned: float
) -> list[AccuracyRow]:
    modes: tuple[PositionMode, ...] = ("compact", "gap")
    return [_measure(open_session, mode, samples, seed, progress, unpruned) for mode in modes]


def _draw_pruned(open_session: _Open, sample: Sample, folder: Path) -> None:
    modes: tuple[PositionMode, ...] = ("compact", "gap")
    for mode in modes:
        _draw(open_session, mode, sample, folder)


def _draw(
    open_session: _Open, positions: PositionMode | None, sample: Sample, folder: Path
) -> None:
    """Draw one answer to ``<pruner>-<keep>-<positions>.png`` or ``unpruned.png``.

    Raises:
        OutputError: the folder cannot be written.
    """
    with open_session(positions or "gap") as session:
        pruning = session.manifest.pruning
        answer = session.ground(sample.image, sample.expression.text)
    name = f"{pruning.pruner}-{pruning.keep_ratio:g}-{positions}" if positions else "unpruned"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(
            "the folder for pictures cannot be made", seen=f"{folder}: {err.strerror or err}"
        ) from err
    save_drawing(draw_grounding(sample.image, answer), folder / f"{name}.png")


def _measure(
    open_session: _Open,
    positions: PositionMode | None,
    samples: list[Sample],
    seed: int,
    progress: Progress,
    unpruned: float | None,
) -> AccuracyRow:
    """Run one bundle over the samples; ``positions`` None for the unpruned row."""
    with open_session(positions or "gap") as session:
        manifest = session.manifest
        pruning = manifest.pruning
        title = f"{pruning.pruner} {pruning.keep_ratio:g} {positions}" if positions else "unpruned"
        ious: list[float] = []
        num_images, num_tokens = 0, 0
        with progress.stage(f"measuring {title}", total=len(samples)) as advance:
            for group in _by_image(samples):
                num_images += 1
                answers = session.ground_batch(
                    group[0].image, [sample.expression.text for sample in group]
                )
                for sample, answer in zip(group, answers, strict=True):
                    box = answer.box
                    num_tokens += len(answer.keep_indices)
                    ious.append(0.0 if box is None else intersection_over_union(box, sample.box))
                advance(len(group))
    accuracy = accuracy_at(ious)
    hits = sum(iou > 0.5 for iou in ious)
    return AccuracyRow(
        model=manifest.model.name,
        pruner=pruning.pruner if positions else "none",
        keep_ratio=pruning.keep_ratio,
        positions=positions or "none",
        seed=seed,
        n=len(ious),
        num_images=num_images,
        acc_at_50=accuracy,
        ci95=wilson_interval(hits, len(ious)),
        mean_iou=sum(ious) / len(ious),
        recovered=accuracy / unpruned if unpruned else None,
        mean_visual_tokens=num_tokens / len(ious),
    )


def _by_image(samples: list[Sample]) -> Iterator[list[Sample]]:
    for _, group in groupby(samples, key=lambda sample: sample.scene.index):
        yield list(group)
