"""From a prepared picture to the visual tokens the decoder reads, one set an expression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import BundleError
from gap_export.runtime.backend import Backend, EncodedImage, FloatArray, ScoredImage
from gap_export.runtime.budget import count_outliers, settle_numbers
from gap_export.runtime.computed import check_computed
from gap_export.runtime.geometry import ImageGeometry
from gap_export.runtime.grounding import TokenGrid
from gap_export.spec.keep_indices import check_keep_indices
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import Int64Array
from gap_export.spec.tiles import TiledTokens, TileLayout, TileTokens, arrange_tiles


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """What the decoder gets to see of a picture.

    M is K' where the picture is not cut into tiles.

    Attributes:
        features: [M, H], in the order they are fed.
        keep_indices: int64 [M], of each its index in the unpruned visual sequence.
        num_visual_tokens: Length of that sequence.
        shape: Its rows and columns; None where it is joined from tiles.
        grids: The same by what they look at.
    """

    features: FloatArray
    keep_indices: Int64Array
    num_visual_tokens: int
    shape: tuple[int, int] | None
    grids: tuple[TokenGrid, ...]


def encode_picture(
    backend: Backend,
    pixel_values: NDArray[np.float32],
    text_embeds: FloatArray | None,
    *,
    manifest: Manifest,
    geometry: ImageGeometry,
    num_rows: int,
) -> list[VisualTokens]:
    """Run the vision encoder, and put what it gives in order.

    It runs once for all expressions, but for a pruner that reads the text on a picture cut into
    tiles: that is once an expression, over all tiles.

    Args:
        backend: Runs it.
        pixel_values: float32 [I, 3, height, width]; I is 1, or the number of tiles.
        text_embeds: [B, D] where the pruner reads the text, else None.
        manifest: Of the model.
        geometry: Of the picture.
        num_rows: B, expressions.

    Returns:
        One for each expression.

    Raises:
        BundleError: the vision encoder's outputs are not of the shape the manifest says.
        ComputationError: they are not finite, or hold the same number everywhere.
    """
    layout = geometry.tile_layout(manifest.image, manifest.grid)
    if layout is None:
        images = 1 if text_embeds is None else num_rows
        encode = _encode if manifest.pruning.budget == "fixed" else _encode_adaptively
        found = [
            _of_whole(row, manifest, geometry)
            for row in encode(backend, pixel_values, text_embeds, manifest, images)
        ]
    else:
        newline = backend.image_newline()
        check_computed(
            newline, graph="the checkpoint", output="image_newline", may_be_constant=True
        )
        per_tile = (
            [None]
            if text_embeds is None
            else [np.repeat(embeds[None], len(pixel_values), axis=0) for embeds in text_embeds]
        )
        found = [
            _of_tiles(
                _encode(backend, pixel_values, embeds, manifest, len(pixel_values)),
                newline=newline,
                layout=layout,
                manifest=manifest,
                geometry=geometry,
            )
            for embeds in per_tile
        ]
    return found * num_rows if len(found) == 1 else found


def _encode(
    backend: Backend,
    pixel_values: NDArray[np.float32],
    text_embeds: FloatArray | None,
    manifest: Manifest,
    images: int,
) -> list[EncodedImage]:
    """What is kept of each of ``images`` rows, without their dimension."""
    encoded = EncodedImage(*backend.encode_image(pixel_values, text_embeds))
    num_kept = manifest.pruning.num_kept_tokens
    return _rows(encoded, manifest, images, num_kept=num_kept, graph="vision_encoder")


def _encode_adaptively(
    backend: Backend,
    pixel_values: NDArray[np.float32],
    text_embeds: FloatArray | None,
    manifest: Manifest,
    images: int,
) -> list[EncodedImage]:
    """As :func:`_encode`; rows that keep as many tokens are pruned together."""
    pruning = manifest.pruning
    scored = backend.score_tokens(pixel_values, text_embeds)
    _check_shape("token_scores", scored.token_scores, (images, pruning.num_visual_tokens))
    _check_floats("vision_encoder", scored)
    numbers = settle_numbers(count_outliers(scored.token_scores), pruning)
    found: dict[int, EncodedImage] = {}
    for number in sorted(set(numbers.tolist())):
        rows = np.flatnonzero(numbers == number)
        some = ScoredImage(*(None if part is None else part[rows] for part in scored))  # type: ignore[arg-type]
        pruned = backend.prune_tokens(some, num_kept_tokens=number)
        each = _rows(pruned, manifest, len(rows), num_kept=number, graph="token_pruner")
        for row, kept in zip(rows, each, strict=True):
            found[int(row)] = kept._replace(token_scores=scored.token_scores[row])
    return [found[row] for row in range(images)]


def _rows(
    encoded: EncodedImage, manifest: Manifest, images: int, *, num_kept: int, graph: str
) -> list[EncodedImage]:
    """Each row by itself, of the shape the manifest says."""
    pruning = manifest.pruning
    emitted = num_kept + pruning.num_emitted_tokens - pruning.num_kept_tokens
    features, keep, scores = encoded
    _check_shape("image_features", features, (images, emitted, manifest.decoder.hidden_size))
    _check_shape("keep_indices", keep, (images, emitted))
    _check_floats(graph, encoded)
    for row in keep:
        check_keep_indices(
            row,
            num_visual_tokens=pruning.num_visual_tokens,
            num_kept_tokens=num_kept,
            ascending=pruning.order == "raster",
            error=BundleError,
            who=f"pruner {pruning.pruner} of this bundle",
        )
    return [
        EncodedImage(features[row], keep[row], None if scores is None else scores[row])
        for row in range(images)
    ]


def _check_floats(graph: str, given: EncodedImage | ScoredImage) -> None:
    for output, values in given._asdict().items():
        if values is not None and values.dtype.kind == "f":
            # Where a pruner finds all tokens equal, those of the lowest indices are kept.
            may_be_constant = output == "token_scores"
            check_computed(values, graph=graph, output=output, may_be_constant=may_be_constant)


def _check_shape(name: str, seen: NDArray[Any], wanted: tuple[int, ...]) -> None:
    if seen.shape != wanted:
        raise BundleError(
            "the vision encoder's outputs are not of the manifest's shape",
            seen=f"{name} {list(seen.shape)}",
            allowed=str(list(wanted)),
            fix="export the bundle again",
        )


def _of_whole(encoded: EncodedImage, manifest: Manifest, geometry: ImageGeometry) -> VisualTokens:
    grid, pruning = manifest.grid, manifest.pruning
    keep, scores = encoded.keep_indices, encoded.token_scores
    extra = pruning.num_emitted_tokens - pruning.num_kept_tokens
    # An extra token looks at no place of its own.
    survivors = keep[: len(keep) - extra]
    stood_out = None
    if pruning.budget == "adaptive":
        assert scores is not None, "a picture decides by scores"
        stood_out = int(count_outliers(scores[None])[0])
    view = TokenGrid(
        view="image",
        rows=grid.rows,
        cols=grid.cols,
        frame=geometry.input_frame(manifest.image),
        kept=tuple(survivors.tolist()),
        tiles=(
            TileTokens(num_visual_tokens=pruning.num_visual_tokens, num_kept_tokens=len(survivors)),
        ),
        scores=None if scores is None else tuple(scores.tolist()),
        stood_out=stood_out,
    )
    return VisualTokens(
        features=encoded.image_features,
        keep_indices=keep,
        num_visual_tokens=pruning.num_visual_tokens,
        shape=(grid.rows, grid.cols),
        grids=(view,),
    )


def _of_tiles(
    encoded: list[EncodedImage],
    *,
    newline: FloatArray,
    layout: TileLayout,
    manifest: Manifest,
    geometry: ImageGeometry,
) -> VisualTokens:
    tokens = arrange_tiles(np.stack([tile.keep_indices for tile in encoded]), layout)
    # The newline comes last, which is what its source, -1, says.
    table = np.concatenate([*(tile.image_features for tile in encoded), newline[None]])
    return VisualTokens(
        features=table[tokens.source],
        keep_indices=tokens.keep_indices,
        num_visual_tokens=tokens.num_visual_tokens,
        shape=None,
        grids=_views(tokens, layout, manifest, geometry),
    )


def _views(
    tokens: TiledTokens, layout: TileLayout, manifest: Manifest, geometry: ImageGeometry
) -> tuple[TokenGrid, TokenGrid]:
    patches = tokens.keep_indices[tokens.source >= 0]
    num_base = layout.rows * layout.cols
    row, col = np.divmod(patches[patches >= num_base] - num_base, layout.num_cols + 1)
    base = TokenGrid(
        view="base",
        rows=layout.rows,
        cols=layout.cols,
        frame=geometry.input_frame(manifest.image),
        kept=tuple(patches[patches < num_base].tolist()),
        tiles=tokens.tiles[:1],
    )
    joined = TokenGrid(
        view="tiles",
        rows=layout.num_rows,
        cols=layout.num_cols,
        frame=geometry.tiles_frame(manifest.image, layout),
        kept=tuple((row * layout.num_cols + col).tolist()),
        tiles=tokens.tiles[1:],
    )
    return base, joined
