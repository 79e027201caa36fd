"""From a prepared image to the visual tokens the decoder reads, one set an expression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import BundleError
from gap_export.runtime.backends.backend import (
    NEWLINE,
    PRUNER,
    VISION,
    Backend,
    Feed,
    FloatArray,
    Outputs,
)
from gap_export.runtime.budget import count_outliers, settle_numbers
from gap_export.runtime.computed import check_computed
from gap_export.runtime.grounding import TokenGrid
from gap_export.runtime.images.geometry import Frame, ImageGeometry
from gap_export.runtime.images.preparations import input_frame, tile_layout
from gap_export.spec.keep_indices import check_keep_indices
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import Int64Array
from gap_export.spec.proportional import spread_counts
from gap_export.spec.tiles import (
    TiledTokens,
    TileLayout,
    TileStack,
    TileTokens,
    arrange_tiles,
    stack_tiles,
)


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """What the decoder gets to see of an image.

    M is K' where the image is not cut into tiles.

    Attributes:
        features: [M, H], in the order they are fed.
        keep_indices: int64 [M], of each its index in the unpruned visual sequence.
        num_visual_tokens: Length of that sequence.
        counts: int64 [M], as how many tokens each counts with proportional attention; see
            ``spec.proportional``.
        shape: Its rows and columns; None where it is joined from tiles.
        grids: The same by what they look at.
    """

    features: FloatArray
    keep_indices: Int64Array
    num_visual_tokens: int
    counts: Int64Array
    shape: tuple[int, int] | None
    grids: tuple[TokenGrid, ...]


def encode_image(
    backend: Backend,
    pixel_values: NDArray[np.float32],
    text_embeds: FloatArray | None,
    *,
    manifest: Manifest,
    geometry: ImageGeometry,
    num_rows: int,
) -> list[VisualTokens]:
    """Run the vision encoder, and put what it gives in order.

    It runs once for all expressions, except for a pruner that reads the text on an image cut into
    tiles: there it runs once an expression, over all tiles.

    Args:
        backend: Runs it.
        pixel_values: float32 [I, 3, height, width]; I is 1, or the number of tiles.
        text_embeds: [B, D] where the pruner reads the text, else None.
        manifest: Describes the model.
        geometry: Says how the image was prepared.
        num_rows: B, the number of expressions.

    Returns:
        One for each expression.

    Raises:
        BundleError: the vision encoder's outputs are not of the shape the manifest says.
        ComputationError: they are not finite, or hold the same number everywhere.
    """
    layout = tile_layout(geometry, manifest.image, manifest.grid)
    if layout is None:
        encode = _encode if manifest.pruning.budget == "fixed" else _encode_adaptively
        feed = _feed(pixel_values, text_embeds)
        if manifest.image.grids:
            number = geometry.canvas_number(manifest.image)
            feed["canvas"] = np.array([number], dtype=np.int64)
        rows = encode(backend, feed, manifest)
        found = [_of_whole(row, manifest, geometry) for row in rows]
    else:
        newline = _newline(backend) if isinstance(layout, TileLayout) else None
        per_tile = (
            [None]
            if text_embeds is None
            else [np.repeat(embeds[None], len(pixel_values), axis=0) for embeds in text_embeds]
        )
        found = [
            _of_tiles(
                _encode(backend, _feed(pixel_values, embeds), manifest),
                newline=newline,
                layout=layout,
                manifest=manifest,
                geometry=geometry,
            )
            for embeds in per_tile
        ]
    return found * num_rows if len(found) == 1 else found


def _feed(pixel_values: NDArray[np.float32], text_embeds: FloatArray | None) -> Outputs:
    """The vision encoder's inputs; each text, or without texts each image, gives a row."""
    feed: Outputs = {"pixel_values": pixel_values}
    return feed if text_embeds is None else feed | {"text_embeds": text_embeds}


def _newline(backend: Backend) -> FloatArray:
    newline = backend.run(NEWLINE, {})["image_newline"]
    check_computed(newline, graph="the checkpoint", output="image_newline", may_be_constant=True)
    return newline


def _num_rows(feed: Feed) -> int:
    return len(feed.get("text_embeds", feed["pixel_values"]))


def _encode(backend: Backend, feed: Feed, manifest: Manifest) -> list[Outputs]:
    """What is kept of each row, without its dimension."""
    outputs = backend.run(VISION, feed)
    num_kept = manifest.pruning.num_kept_tokens
    return _rows(outputs, manifest, _num_rows(feed), num_kept=num_kept, graph=VISION)


def _encode_adaptively(backend: Backend, feed: Feed, manifest: Manifest) -> list[Outputs]:
    """As :func:`_encode`; rows that keep as many tokens are pruned together."""
    pruning, num_rows = manifest.pruning, _num_rows(feed)
    scored = backend.run(VISION, feed)
    scores = scored["token_scores"]
    _check_shape("token_scores", scores, (num_rows, pruning.num_visual_tokens))
    _check_floats(VISION, scored)
    numbers = settle_numbers(count_outliers(scores), pruning)
    found: dict[int, Outputs] = {}
    for number in sorted(set(numbers.tolist())):
        rows = np.flatnonzero(numbers == number)
        some = {name: values[rows] for name, values in scored.items()}
        some["num_kept_tokens"] = np.array([number], dtype=np.int64)
        pruned = backend.run(PRUNER, some)
        each = _rows(pruned, manifest, len(rows), num_kept=number, graph=PRUNER)
        for row, kept in zip(rows.tolist(), each, strict=True):
            found[row] = kept | {"token_scores": scores[row]}
    return [found[row] for row in range(num_rows)]


def _rows(
    outputs: Feed, manifest: Manifest, num_rows: int, *, num_kept: int, graph: str
) -> list[Outputs]:
    """Each row by itself, of the shape the manifest says."""
    pruning = manifest.pruning
    emitted = num_kept + pruning.num_emitted_tokens - pruning.num_kept_tokens
    width = manifest.decoder.embeds_size
    _check_shape("image_features", outputs["image_features"], (num_rows, emitted, width))
    _check_shape("keep_indices", outputs["keep_indices"], (num_rows, emitted))
    _check_floats(graph, outputs)
    for row in outputs["keep_indices"]:
        check_keep_indices(
            row,
            num_visual_tokens=pruning.num_visual_tokens,
            num_kept_tokens=num_kept,
            ascending=pruning.order == "raster",
            error=BundleError,
            who=f"pruner {pruning.pruner} of this bundle",
        )
    return [{name: values[row] for name, values in outputs.items()} for row in range(num_rows)]


def _check_floats(graph: str, outputs: Feed) -> None:
    for output, values in outputs.items():
        if values.dtype.kind == "f":
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


def _of_whole(row: Outputs, manifest: Manifest, geometry: ImageGeometry) -> VisualTokens:
    pruning = manifest.pruning
    rows, cols = geometry.token_grid(manifest.image, manifest.grid)
    keep, scores = row["keep_indices"], row.get("token_scores")
    extra = pruning.num_emitted_tokens - pruning.num_kept_tokens
    # An extra token looks at no place of its own.
    survivors = keep[: len(keep) - extra]
    stood_out = None
    if pruning.budget == "adaptive":
        assert scores is not None, "an adaptive budget goes by scores"
        stood_out = int(count_outliers(scores[None])[0])
    view = TokenGrid(
        view="image",
        rows=rows,
        cols=cols,
        frame=input_frame(geometry, manifest.image),
        kept=tuple(survivors.tolist()),
        tiles=(
            TileTokens(num_visual_tokens=pruning.num_visual_tokens, num_kept_tokens=len(survivors)),
        ),
        scores=None if scores is None else tuple(scores.tolist()),
        stood_out=stood_out,
    )
    return VisualTokens(
        features=row["image_features"],
        keep_indices=keep,
        num_visual_tokens=pruning.num_visual_tokens,
        counts=spread_counts(pruning.num_visual_tokens, len(keep)),
        shape=(rows, cols),
        grids=(view,),
    )


def _of_tiles(
    rows: list[Outputs],
    *,
    newline: FloatArray | None,
    layout: TileLayout | TileStack,
    manifest: Manifest,
    geometry: ImageGeometry,
) -> VisualTokens:
    keep = np.stack([tile["keep_indices"] for tile in rows])
    features = [tile["image_features"] for tile in rows]
    whole = input_frame(geometry, manifest.image)
    if isinstance(layout, TileLayout):
        assert newline is not None
        tokens = arrange_tiles(keep, layout)
        # The newline comes last, which is what its source, -1, says.
        features.append(newline[None])
        grids = _joined_grids(tokens, layout, whole, geometry.tiles_frame(manifest.image, layout))
    else:
        tokens = stack_tiles(keep, layout)
        grids = _stacked_grids(keep, tokens, layout, whole)
    # Newlines are all there, pruned or not.
    counts, is_patch = np.ones_like(tokens.keep_indices), tokens.source >= 0
    num_newlines = int((~is_patch).sum())
    counts[is_patch] = spread_counts(tokens.num_visual_tokens - num_newlines, int(is_patch.sum()))
    return VisualTokens(
        features=np.concatenate(features)[tokens.source],
        keep_indices=tokens.keep_indices,
        num_visual_tokens=tokens.num_visual_tokens,
        counts=counts,
        shape=None,
        grids=grids,
    )


def _joined_grids(
    tokens: TiledTokens, layout: TileLayout, whole: Frame, tiles: Frame
) -> tuple[TokenGrid, TokenGrid]:
    """The base tile, and all other tiles joined without their padding."""
    patches = tokens.keep_indices[tokens.source >= 0]
    num_base = layout.rows * layout.cols
    row, col = np.divmod(patches[patches >= num_base] - num_base, layout.num_cols + 1)
    base = TokenGrid(
        view="base",
        rows=layout.rows,
        cols=layout.cols,
        frame=whole,
        kept=tuple(patches[patches < num_base].tolist()),
        tiles=tokens.tiles[:1],
    )
    joined = TokenGrid(
        view="tiles",
        rows=layout.num_rows,
        cols=layout.num_cols,
        frame=tiles,
        kept=tuple((row * layout.num_cols + col).tolist()),
        tiles=tokens.tiles[1:],
    )
    return base, joined


def _stacked_grids(
    keep: Int64Array, tokens: TiledTokens, stack: TileStack, whole: Frame
) -> tuple[TokenGrid, TokenGrid]:
    """The thumbnail, which is fed last, and the tiles before it joined; both show all."""
    tile_row, tile_col = np.divmod(np.arange(stack.num_tiles - 1)[:, None], stack.tile_cols)
    row, col = np.divmod(keep[:-1], stack.cols)
    num_cols = stack.tile_cols * stack.cols
    cells = (tile_row * stack.rows + row) * num_cols + tile_col * stack.cols + col
    thumbnail = TokenGrid(
        view="base",
        rows=stack.rows,
        cols=stack.cols,
        frame=whole,
        kept=tuple(keep[-1].tolist()),
        tiles=tokens.tiles[-1:],
    )
    joined = TokenGrid(
        view="tiles",
        rows=stack.tile_rows * stack.rows,
        cols=num_cols,
        frame=whole,
        kept=tuple(cells.reshape(-1).tolist()),
        tiles=tokens.tiles[:-1],
    )
    return thumbnail, joined
