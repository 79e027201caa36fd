"""From a prepared picture to the visual tokens the decoder reads, one set an expression."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import BundleError
from gap_export.manifest import Manifest
from gap_export.positions import Int64Array, TiledTokens, TileLayout, TileTokens, arrange_tiles
from gap_export.runtime.backend import Backend, FloatArray
from gap_export.runtime.geometry import ImageGeometry
from gap_export.runtime.grounding import TokenGrid


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """What the decoder gets to see of a picture.

    M is K' where the picture is not cut into tiles.

    Attributes:
        features: [M, H], in the order they are fed.
        keep_indices: int64 [M], of each its index in the unpruned visual sequence.
        num_visual_tokens: Length of that sequence.
        grids: The same by what they look at.
    """

    features: FloatArray
    keep_indices: Int64Array
    num_visual_tokens: int
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
    """
    layout = geometry.tile_layout(manifest.image, manifest.grid)
    if layout is None:
        images = 1 if text_embeds is None else num_rows
        features, keep = _encode(backend, pixel_values, text_embeds, manifest, images)
        found = [
            _of_whole(features[row], keep[row], manifest, geometry) for row in range(len(features))
        ]
    else:
        newline = backend.image_newline()
        per_tile = (
            [None]
            if text_embeds is None
            else [np.repeat(embeds[None], len(pixel_values), axis=0) for embeds in text_embeds]
        )
        found = [
            _of_tiles(
                *_encode(backend, pixel_values, embeds, manifest, len(pixel_values)),
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
) -> tuple[FloatArray, Int64Array]:
    """Features [I, K', H] and keep_indices [I, K'], of the shape the manifest says."""
    features, keep = backend.encode_image(pixel_values, text_embeds)
    emitted, hidden = manifest.pruning.num_emitted_tokens, manifest.decoder.hidden_size
    if features.shape != (images, emitted, hidden) or keep.shape != (images, emitted):
        raise BundleError(
            "the vision encoder's outputs are not of the manifest's shape",
            seen=f"image_features {list(features.shape)}, keep_indices {list(keep.shape)}",
            allowed=f"{[images, emitted, hidden]} and {[images, emitted]}",
            fix="export the bundle again",
        )
    return features, keep


def _of_whole(
    features: FloatArray, keep: Int64Array, manifest: Manifest, geometry: ImageGeometry
) -> VisualTokens:
    grid, num_visual_tokens = manifest.grid, manifest.pruning.num_visual_tokens
    view = TokenGrid(
        view="image",
        rows=grid.rows,
        cols=grid.cols,
        frame=geometry.input_frame(manifest.image),
        kept=tuple(keep.tolist()),
        tiles=(TileTokens(num_visual_tokens=num_visual_tokens, num_kept_tokens=len(keep)),),
    )
    return VisualTokens(
        features=features, keep_indices=keep, num_visual_tokens=num_visual_tokens, grids=(view,)
    )


def _of_tiles(
    features: FloatArray,
    keep: Int64Array,
    *,
    newline: FloatArray,
    layout: TileLayout,
    manifest: Manifest,
    geometry: ImageGeometry,
) -> VisualTokens:
    tokens = arrange_tiles(keep, layout)
    # The newline comes last, which is what its source, -1, says.
    table = np.concatenate([features.reshape(-1, features.shape[-1]), newline[None]])
    return VisualTokens(
        features=table[tokens.source],
        keep_indices=tokens.keep_indices,
        num_visual_tokens=tokens.num_visual_tokens,
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
