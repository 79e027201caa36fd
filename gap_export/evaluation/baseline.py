"""The unpruned model that a bundle is measured beside."""

from __future__ import annotations

from dataclasses import replace

from gap_export.checkpoint.find.source import MAIN
from gap_export.errors import UsageError
from gap_export.exporting import DTYPES, Dtype
from gap_export.spec.manifest import Activations, Manifest, QuantizationSpec, SourceFile


def check_baseline(manifest: Manifest, baseline: Manifest) -> None:
    """Refuse a baseline that is not the same model with all its tokens.

    Args:
        manifest: Manifest of the bundle that is measured.
        baseline: Manifest of the unpruned bundle.

    Raises:
        UsageError: another model, other weights, other preparation, or pruned.
    """
    mine, theirs = _source_files(manifest), _source_files(baseline)
    # A pruner that reads the text brings files of its own; what both have must be the same.
    common = mine.keys() & theirs.keys()
    other_files = sorted(path for path in common if mine[path].sha256 != theirs[path].sha256)
    facts = ("model", "grid", "image", "box", "decoder", "dtype")
    other_facts = [name for name in facts if getattr(manifest, name) != getattr(baseline, name)]
    # Where the question stands is for pruners, and bundles of before do not say it.
    if replace(manifest.prompt, question=None) != replace(baseline.prompt, question=None):
        other_facts.append("prompt")
    seen = [
        *(f"another {name}" for name in other_facts),
        *(f"another {path}" for path in other_files),
    ]
    if quantization_of(manifest) != quantization_of(baseline):
        seen.append("another quantization")
    if activations_of(manifest) != activations_of(baseline):
        seen.append(f"{activations_of(baseline)} activations")
    if manifest.has_int8_tower != baseline.has_int8_tower:
        seen.append(f"{'an int8' if baseline.has_int8_tower else 'a float'} tower")
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
            fix=f"make one with: gap-export {manifest.model.name} --keep 1"
            f"{_canvas(manifest, baseline)}",
        )


def _canvas(manifest: Manifest, baseline: Manifest) -> str:
    """The option that gives a baseline the bundle's canvases, where it has others."""
    image, grid = manifest.image, manifest.grid
    if image == baseline.image or image.tiles is not None:
        return ""
    down, across = image.height // grid.rows, image.width // grid.cols
    sizes = image.grids or ((grid.rows, grid.cols),)
    return f" --canvas {','.join(f'{cols * across}x{rows * down}' for rows, cols in sizes)}"


def quantization_of(manifest: Manifest) -> QuantizationSpec | None:
    """How weights are quantized; None where none are."""
    return next((graph.quantization for graph in manifest.graphs if graph.quantization), None)


def activations_of(manifest: Manifest) -> Activations:
    """What goes into layers of quantized weights in ONNX Runtime."""
    return "int8" if any(graph.activations == "int8" for graph in manifest.graphs) else "float"


def dtype_of(manifest: Manifest) -> Dtype:
    """The dtype of a manifest, as an option of an export."""
    (found,) = [dtype for dtype in DTYPES if dtype == manifest.dtype]
    return found


def _source_files(manifest: Manifest) -> dict[str, SourceFile]:
    """Files of the checkpoint by ``role/path``; by the path alone in the main part."""
    return {
        file.path if part.role == MAIN else f"{part.role}/{file.path}": file
        for part in manifest.source.parts
        for file in part.files
    }
