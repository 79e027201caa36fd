"""The vision side of any family: image to kept tokens, as one graph or as two.

Where each image decides how many of its tokens are kept, one graph gives features and scores, and a
second keeps the number that it is given: the tower runs once all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gap_export.checkpoint.weights import Weight
from gap_export.errors import GapExportError, UsageError
from gap_export.families.common.checkpoints.clip_text_tower import TextTowerSource
from gap_export.families.common.modules.projector import build_projector
from gap_export.families.common.modules.pruned_vision import (
    JointSpace,
    NextLayer,
    PrunedVisionEncoder,
    ScoredVisionEncoder,
    TokenPruner,
    VisionParts,
)
from gap_export.families.common.reference import Component, ModelSource, spec
from gap_export.pruning import PRESETS, FixedPruner, Pruner, ScoringPruner, find_pruner
from gap_export.pruning.probe import fixed_places, probe_pruner
from gap_export.spec.architecture import DecoderShape
from gap_export.spec.keep_indices import check_keep_indices
from gap_export.spec.manifest import GridSpec, PruningSpec, TensorSpec
from gap_export.spec.places import rope_sums, token_places
from gap_export.spec.recipe import Recipe

_F32, _I64 = "float32", "int64"
_LAYERS = "encoder.layers"


def vision_components(
    tower: nn.Module,
    source: ModelSource,
    pruning: PruningSpec,
    *,
    recipe: Recipe,
    text: TextTowerSource | None,
    dtype: str,
) -> list[Component]:
    """``vision_encoder`` and, with an adaptive budget, ``token_pruner``.

    Args:
        tower: On the meta device, image to ``VisionFeatures``. Its tensors are the source's
            ``tower.*``, its layers ``encoder.layers``.
        source: Holds the weights.
        pruning: Who survives, how many, in which order, with which extra token.
        recipe: Says the image's size and the grid.
        text: Where the pruner reads the text in CLIP's joint space.
        dtype: Dtype of the float outputs; scores are float32 in any case.

    Raises:
        GapExportError: a pruner of another package does not choose K different tokens.
    """
    pruner, vision = find_pruner(pruning.pruner), source.architecture.vision
    width, eps = vision.width, vision.layer_norm_eps
    parts = VisionParts(
        tower=tower,
        joint_space=None
        if text is None
        else JointSpace(width=width, embed_dim=text.shape.embed_dim, eps=eps),
        next_layer=NextLayer(width=width, eps=eps) if "next_layer" in pruner.reads else None,
        pruner=pruner,
        pruning=pruning,
        num_canvases=len(recipe.image.grids),
    )
    if pruning.pruner not in PRESETS and not isinstance(pruner, FixedPruner):
        probe_pruner(pruner, pruning)
    projector = build_projector(source.architecture.projector)
    if pruning.budget == "fixed":
        encoder = PrunedVisionEncoder(parts, projector=projector, grid=recipe.grid)
        return [_vision(encoder, source, recipe=recipe, text=text, dtype=dtype)]
    assert isinstance(pruner, ScoringPruner), "an image decides by scores"
    if recipe.image.grids and pruning.extra_position == "centroid":
        raise UsageError(
            "an adaptive budget knows no center of what is dropped on several canvases",
            seen="extra position centroid",
            allowed="last",
            fix="export a bundle for each canvas",
        )
    return [
        _vision(ScoredVisionEncoder(parts), source, recipe=recipe, text=text, dtype=dtype),
        _token_pruner(
            TokenPruner(projector=projector, pruner=pruner, pruning=pruning, grid=recipe.grid),
            source,
            rows=_rows(pruner),
            dtype=dtype,
        ),
    ]


def _vision(
    module: PrunedVisionEncoder | ScoredVisionEncoder,
    source: ModelSource,
    *,
    recipe: Recipe,
    text: TextTowerSource | None,
    dtype: str,
) -> Component:
    pruning, pruner = module.pruning, module.pruner
    size, decoder = (recipe.image.height, recipe.image.width), source.architecture.decoder
    inputs = [spec("pixel_values", "num_images", 3, *size, dtype=_F32)]
    sizes = {"num_images": 2}
    rows = _rows(pruner)
    if pruner.reads_text:
        width = decoder.hidden_size if text is None else text.shape.embed_dim
        inputs.append(spec("text_embeds", rows, width, dtype=dtype))
        sizes[rows] = 3
    if module.takes_canvas:
        inputs.append(spec("canvas", 1, dtype=_I64))
    layers = module.tower.get_submodule(_LAYERS)
    assert isinstance(layers, nn.ModuleList)
    weights = _weights(source.weights, text, num_layers=len(layers))
    tokens = pruning.num_visual_tokens
    scores = spec("token_scores", rows, tokens, dtype=_F32)
    if isinstance(module, ScoredVisionEncoder):
        outputs = [scores, *_patches(module.pruner, source, tokens=tokens, rows=rows, dtype=dtype)]
    else:
        emitted, hidden = pruning.num_emitted_tokens, decoder.embeds_size
        outputs = [
            spec("image_features", rows, emitted, hidden, dtype=dtype),
            spec("keep_indices", rows, emitted, dtype=_I64),
            *([scores] if isinstance(pruner, ScoringPruner) else []),
        ]
    return Component(
        name="vision_encoder",
        prunes=True,
        module=module,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        example_sizes=sizes,
        weight_refs={key: weights[key] for key in module.state_dict()},
        constants=_constants(module, recipe, decoder),
        # A tap reads what is between layers.
        repeated=None if source.architecture.vision.taps else f"tower.{_LAYERS}",
    )


def _token_pruner(module: TokenPruner, source: ModelSource, *, rows: str, dtype: str) -> Component:
    pruning, hidden = module.pruning, source.architecture.decoder.embeds_size
    tokens = pruning.num_visual_tokens
    scores = spec("token_scores", rows, tokens, dtype=_F32)
    emitted = "num_kept_tokens" if pruning.extra_token == "none" else "num_kept_tokens + 1"
    return Component(
        name="token_pruner",
        prunes=True,
        module=module,
        inputs=(
            spec("kept_slots", "num_kept_tokens", dtype=_I64),
            scores,
            *_patches(module.pruner, source, tokens=tokens, rows=rows, dtype=dtype),
        ),
        outputs=(
            spec("image_features", rows, emitted, hidden, dtype=dtype),
            spec("keep_indices", rows, emitted, dtype=_I64),
        ),
        # No two alike, and less than the tokens of any model worth pruning.
        example_sizes={rows: 2, "num_kept_tokens": 3},
        weight_refs={key: source.weights[key] for key in module.state_dict()},
        constants={},
    )


def _rows(pruner: Pruner) -> str:
    """Of what each gives a row: texts, or images where none is read."""
    return "batch_size" if pruner.reads_text else "num_images"


def _patches(
    pruner: ScoringPruner | object, source: ModelSource, *, tokens: int, rows: str, dtype: str
) -> list[TensorSpec]:
    """What the second graph takes from the first beside the scores."""
    assert isinstance(pruner, ScoringPruner)
    vision, projector = source.architecture.vision, source.architecture.projector
    found = [spec("patch_features", rows, tokens, projector.features_size, dtype=dtype)]
    if pruner.merges_by is not None:
        heads = vision.num_heads if pruner.merges_by == "keys" else 1
        found.append(spec("patch_keys", rows, tokens, projector.width // heads, dtype=dtype))
    return found


def _weights(
    named: Mapping[str, Weight], text: TextTowerSource | None, *, num_layers: int
) -> dict[str, Weight]:
    """The source's weights, some of them also by the names of modules that read them again."""
    found = dict(named)
    behind = f"tower.{_LAYERS}.{num_layers}"
    for ours, theirs in (
        ("layer_norm1", "layer_norm1"),
        ("q_proj", "self_attn.q_proj"),
        ("k_proj", "self_attn.k_proj"),
    ):
        for part in ("weight", "bias"):
            if f"{behind}.{theirs}.{part}" in named:
                found[f"next_layer.{ours}.{part}"] = named[f"{behind}.{theirs}.{part}"]
    if text is not None:
        found["joint_space.visual_projection.weight"] = text.visual_projection
        for part in ("weight", "bias"):
            found[f"joint_space.post_layernorm.{part}"] = named[f"tower.post_layernorm.{part}"]
    return found


def _constants(
    module: PrunedVisionEncoder | ScoredVisionEncoder, recipe: Recipe, decoder: DecoderShape
) -> dict[str, NDArray[Any]]:
    """Constants of the graph that depend on the grid: of several canvases one behind the other.

    Raises:
        GapExportError: as :func:`_fixed_places`.
    """
    pruner, pruning = module.pruner, module.pruning
    grids = [GridSpec(rows=rows, cols=cols) for rows, cols in recipe.image.grids]

    def of_each(made: Callable[[GridSpec], NDArray[Any]]) -> NDArray[Any]:
        return np.stack([made(grid) for grid in grids]) if grids else made(recipe.grid)

    found: dict[str, NDArray[Any]] = {}
    if isinstance(pruner, FixedPruner):
        found["fixed_places"] = of_each(lambda grid: _fixed_places(pruner, pruning, grid))
    if "places" in pruner.reads:
        found["places"] = of_each(token_places)
    if "rope_sums" in pruner.reads:
        found["rope_sums"] = of_each(lambda grid: rope_sums(grid, decoder))
    if hasattr(module, "canvas_cols"):
        found["canvas_cols"] = np.array([grid.cols for grid in grids], dtype=np.int64)
    return found


def _fixed_places(pruner: FixedPruner, pruning: PruningSpec, grid: GridSpec) -> NDArray[np.int64]:
    """Places that are a constant of the graph, in the order they are fed.

    Raises:
        GapExportError: they are no K different ones of 0..N-1, or the pruner raises.
    """
    places = fixed_places(pruner, pruning, grid)
    ordered = np.sort(places) if pruning.order == "raster" else places
    check_keep_indices(
        ordered,
        num_visual_tokens=pruning.num_visual_tokens,
        num_kept_tokens=pruning.num_kept_tokens,
        ascending=pruning.order == "raster",
        error=GapExportError,
        who=f"pruner {pruning.pruner}",
    )
    return ordered
