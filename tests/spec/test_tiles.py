"""Tiles joined to one visual sequence: against transformers, and against a loop."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.errors import UsageError
from gap_export.runtime.images.geometry import ImageGeometry, choose_canvas
from gap_export.runtime.images.preparations import tile_layout
from gap_export.spec.manifest import GridSpec, ImageSpec, TilesSpec
from gap_export.spec.positions import VisualSpan, build_kept_positions
from gap_export.spec.recipe import find_recipe
from gap_export.spec.tiles import (
    TiledTokens,
    TileLayout,
    TileStack,
    TileTokens,
    arrange_tiles,
    stack_tiles,
)

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIDES = [
    *(1, 2, 3, 7, 24, 97, 240, 333, 336, 337),
    *(479, 480, 500, 512, 640, 671, 672, 1000, 1333, 3024),
]
SIZES = [(width, height) for width in SIDES for height in SIDES]


def layout_of(width: int, height: int, *, grid: int = 24) -> TileLayout:
    """As LLaVA-1.6 would lay the image out; ``grid`` stands for 24 tokens a side."""
    canvas = choose_canvas((height, width), [(h, w) for h, w in PINPOINTS])
    return TileLayout.for_image(
        width,
        height,
        rows=grid,
        cols=grid,
        tile_rows=canvas[0] // 336,
        tile_cols=canvas[1] // 336,
    )


def packed_by_transformers(width: int, height: int, *, grid: int = 24) -> np.ndarray:
    """What each token of transformers' sequence is: tile * N + n, or -1 for a newline."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    layout = layout_of(width, height, grid=grid)
    config = SimpleNamespace(
        image_grid_pinpoints=PINPOINTS,
        vision_config=SimpleNamespace(image_size=336, patch_size=336 // grid),
    )
    numbers = torch.arange(layout.num_tiles * grid * grid, dtype=torch.float64)
    (packed,), _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [numbers.reshape(layout.num_tiles, grid * grid, 1)],
        [(height, width)],
        "default",
        image_newline=torch.tensor([-1.0], dtype=torch.float64),
    )
    return packed[:, 0].numpy().astype(np.int64)


def test_number_of_tokens_is_transformers():
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
        patch_size=14,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *given: LlavaNextProcessor._get_unpadded_features(
            None, *given
        ),
    )
    for width, height in SIZES:
        expected = LlavaNextProcessor._get_number_of_features(processor, height, width, 336, 336)
        assert layout_of(width, height).num_visual_tokens == expected, (width, height)


def test_order_of_all_tokens_is_transformers():
    for width, height in SIZES[::3]:
        layout = layout_of(width, height, grid=8)
        every = np.tile(np.arange(64), (layout.num_tiles, 1))
        tokens = arrange_tiles(every, layout)
        # Nothing was pruned, so tile * K + k is tile * N + n.
        expected = packed_by_transformers(width, height, grid=8)
        assert tokens.source.tolist() == expected.tolist(), (width, height)
        assert tokens.keep_indices.tolist() == list(range(len(expected)))
        assert tokens.num_visual_tokens == len(expected)


def arranged_by_loop(keep: np.ndarray, layout: TileLayout) -> list[tuple[int, int]]:
    """(source, index) of each fed token, by walking through the unpruned sequence."""
    per_tile, num_kept = layout.rows * layout.cols, keep.shape[1]
    fed: list[tuple[int, int]] = []
    index = 0

    def visit(tile: int, cell: int) -> None:
        places = [k for k in range(num_kept) if keep[tile, k] == cell]
        fed.extend((tile * num_kept + k, index) for k in places)

    for cell in range(per_tile):
        visit(0, cell)
        index += 1
    for row in range(layout.first_row, layout.first_row + layout.num_rows):
        for col in range(layout.first_col, layout.first_col + layout.num_cols):
            tile = row // layout.rows * layout.tile_cols + col // layout.cols
            visit(1 + tile, row % layout.rows * layout.cols + col % layout.cols)
            index += 1
        fed.append((-1, index))
        index += 1
    assert index == layout.num_visual_tokens
    return fed


@st.composite
def kept_tiles(draw: st.DrawFn) -> tuple[np.ndarray, TileLayout]:
    layout = TileLayout.for_image(
        draw(st.integers(1, 60)),
        draw(st.integers(1, 60)),
        rows=draw(st.integers(1, 4)),
        cols=draw(st.integers(1, 4)),
        tile_rows=draw(st.integers(1, 3)),
        tile_cols=draw(st.integers(1, 3)),
    )
    total = layout.rows * layout.cols
    num_kept = draw(st.integers(1, total))
    tiles = [
        sorted(draw(st.permutations(range(total)))[:num_kept]) for _ in range(layout.num_tiles)
    ]
    return np.asarray(tiles, dtype=np.int64), layout


@settings(deadline=None)
@given(kept_tiles())
def test_pruned_tiles_are_arranged_as_by_a_loop(case):
    keep, layout = case
    tokens = arrange_tiles(keep, layout)
    expected = arranged_by_loop(keep, layout)
    assert list(zip(tokens.source.tolist(), tokens.keep_indices.tolist(), strict=True)) == expected
    assert tokens.source.dtype == tokens.keep_indices.dtype == np.int64
    check_account(tokens, keep, layout)


def check_account(tokens: TiledTokens, keep: np.ndarray, layout: TileLayout) -> None:
    assert len(tokens.tiles) == layout.num_tiles
    fed = tokens.source[tokens.source >= 0] // keep.shape[1]
    for number, tile in enumerate(tokens.tiles):
        assert tile.num_visual_tokens == layout.rows * layout.cols
        assert tile.num_kept_tokens == keep.shape[1]
        assert tile.num_kept_tokens - tile.num_padding_tokens == (fed == number).sum()
    assert sum(tile.num_newline_tokens for tile in tokens.tiles) == layout.num_rows
    assert tokens.tiles[0].num_newline_tokens == 0


def test_account_of_a_wide_image_at_known_numbers():
    # 2:1 on a 2x2 canvas of 4x4 tokens: of 8 rows the middle 4 show the image.
    layout = TileLayout.for_image(80, 40, rows=4, cols=4, tile_rows=2, tile_cols=2)
    assert (layout.first_row, layout.num_rows, layout.first_col, layout.num_cols) == (2, 4, 0, 8)
    assert layout.num_visual_tokens == 16 + 4 * 9
    tokens = arrange_tiles(np.tile([0, 7, 8], (5, 1)), layout)
    # Upper tiles lose cells 0 and 7 (rows 0 and 1), lower ones cell 8 (row 2).
    assert tokens.tiles == (
        TileTokens(num_visual_tokens=16, num_kept_tokens=3),
        TileTokens(num_visual_tokens=16, num_kept_tokens=3, num_padding_tokens=2),
        TileTokens(
            num_visual_tokens=16, num_kept_tokens=3, num_padding_tokens=2, num_newline_tokens=2
        ),
        TileTokens(num_visual_tokens=16, num_kept_tokens=3, num_padding_tokens=1),
        TileTokens(
            num_visual_tokens=16, num_kept_tokens=3, num_padding_tokens=1, num_newline_tokens=2
        ),
    )
    assert tokens.source.tolist() == [0, 1, 2, 5, 8, -1, -1, 9, 12, -1, 10, 13, -1]
    assert tokens.keep_indices.tolist() == [0, 7, 8, 16, 20, 24, 33, 34, 38, 42, 46, 50, 51]


@pytest.mark.parametrize(("width", "height"), [(3000, 1), (1, 3000), (60_000, 2)])
def test_extremely_thin_image_has_a_base_tile_and_maybe_newlines(width, height):
    layout = layout_of(width, height)
    keep = np.tile(np.arange(0, 576, 3), (layout.num_tiles, 1))
    tokens = arrange_tiles(keep, layout)
    assert layout.num_rows * layout.num_cols == 0
    assert (tokens.source >= 0).sum() == 192
    assert (tokens.source == -1).sum() == layout.num_rows
    assert sum(tile.num_padding_tokens for tile in tokens.tiles[1:]) == 192 * (layout.num_tiles - 1)


LAYOUT = TileLayout.for_image(80, 40, rows=2, cols=3, tile_rows=1, tile_cols=2)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([[0, 1]], r"one row a tile: shape \[1, 2\]; allowed: \[3, K\]"),
        ([0, 1, 2], "one row a tile"),
        ([[], [], []], "one row a tile"),
        ([[0, 6]] * 3, r"out of range: 0\.\.6; allowed: 0\.\.5"),
        ([[-1, 2]] * 3, "out of range: -1"),
        ([[0, 1], [0, 1], [2, 1]], "not in raster order"),
        ([[0, 1], [0, 1], [1, 1]], "not in raster order"),
    ],
)
def test_indices_that_do_not_fit_are_refused(keep, message):
    with pytest.raises(UsageError, match=message):
        arrange_tiles(np.asarray(keep, dtype=np.int64), LAYOUT)
    stack = TileStack(rows=2, cols=3, tile_rows=2, tile_cols=1)
    with pytest.raises(UsageError, match=message):
        stack_tiles(np.asarray(keep, dtype=np.int64), stack)


def test_stacked_tiles_follow_each_other_thumbnail_last():
    # Two tiles of 2x2 tokens beside each other, and the thumbnail.
    stack = TileStack(rows=2, cols=2, tile_rows=1, tile_cols=2)
    tokens = stack_tiles(np.array([[0, 3], [1, 2], [0, 2]]), stack)
    assert (stack.num_tiles, stack.num_visual_tokens) == (3, 12)
    assert tokens.keep_indices.tolist() == [0, 3, 5, 6, 8, 10]
    assert tokens.source.tolist() == list(range(6))
    assert tokens.num_visual_tokens == 12
    assert tokens.tiles == (TileTokens(num_visual_tokens=4, num_kept_tokens=2),) * 3
    span = VisualSpan(start=5, num_visual_tokens=12, keep_indices=tokens.keep_indices)
    table = build_kept_positions(unpruned_length=20, spans=[span])
    assert table.tolist() == [0, 1, 2, 3, 4, 5, 8, 10, 11, 13, 15, 17, 18, 19]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.data())
def test_stacked_tokens_are_where_a_walk_through_the_sequence_finds_them(
    tile_rows, tile_cols, num_kept, data
):
    stack = TileStack(rows=2, cols=3, tile_rows=tile_rows, tile_cols=tile_cols)
    few = st.sets(st.integers(0, 5), min_size=num_kept, max_size=num_kept)
    keep = [sorted(data.draw(few)) for _ in range(stack.num_tiles)]
    tokens = stack_tiles(np.array(keep), stack)
    walked = [(tile, cell) for tile in range(stack.num_tiles) for cell in range(6)]
    fed = [place for place, (tile, cell) in enumerate(walked) if cell in keep[tile]]
    assert tokens.keep_indices.tolist() == fed
    assert tokens.source.tolist() == list(range(len(fed)))


@pytest.mark.parametrize("name", ["width", "height", "rows", "cols", "tile_rows", "tile_cols"])
def test_layout_of_nothing_is_refused(name):
    sizes = {"width": 9, "height": 9, "rows": 2, "cols": 2, "tile_rows": 1, "tile_cols": 1}
    sizes[name] = 0
    with pytest.raises(UsageError, match="needs pixels, tokens and tiles"):
        TileLayout.for_image(sizes.pop("width"), sizes.pop("height"), **sizes)


def test_layout_is_plain_frozen_data():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LAYOUT.rows = 5  # type: ignore[misc]


def authors_canvas(width: int, height: int) -> tuple[int, int]:
    """(width, height) of the canvas of LLaVA's own code, whose list is of (width, height)."""
    best, most, least = (0, 0), -1, 0
    for across, down in PINPOINTS:
        scale = min(across / width, down / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (across, down), shown, wasted
    return best


def authors_unpadded(width: int, height: int, canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """First row and column, rows and columns, of a grid of tokens without its padding."""
    across, down = canvas[0] // 14, canvas[1] // 14
    tokens = np.arange(across * down).reshape(down, across)
    if width / height > across / down:
        cut = (down - int(height * (across / width))) // 2
        tokens = tokens[cut : down - cut]
    else:
        cut = (across - int(width * (down / height))) // 2
        tokens = tokens[:, cut : across - cut]
    row, col = divmod(int(tokens.flat[0]), across) if tokens.size else (cut, 0)
    return row, col, *tokens.shape


def authors_image() -> ImageSpec:
    image = find_recipe("llava-next")[0].image
    sizes = tuple((height, width) for width, height in PINPOINTS)
    return dataclasses.replace(image, tiles=TilesSpec(resolutions=sizes, follows="authors"))


def layout_by_spec(width: int, height: int, image: ImageSpec) -> TileLayout:
    assert image.tiles is not None
    canvas = choose_canvas((height, width), image.tiles.resolutions)
    geometry = ImageGeometry(width=width, height=height, canvas=canvas)
    layout = tile_layout(geometry, image, GridSpec(rows=24, cols=24))
    assert layout is not None
    return layout


ROUNDED = [(748, 352), (352, 748), (752, 1786), (836, 352), (335, 336), (337, 335), (335, 337)]
SMALL = [(width, height) for width in range(20, 341, 20) for height in range(20, 341, 20)]


def test_published_checkpoints_cut_as_their_authors_do():
    image, differ = authors_image(), set()
    assert image.tiles is not None
    for width, height in [*SIZES, *SMALL, *ROUNDED]:
        canvas = choose_canvas((height, width), image.tiles.resolutions)
        assert canvas[::-1] == authors_canvas(width, height), (width, height)
        layout = layout_by_spec(width, height, image)
        row, col, rows, cols = authors_unpadded(width, height, canvas[::-1])
        if rows and cols:
            assert (layout.first_row, layout.first_col) == (row, col), (width, height)
        assert (layout.num_rows, layout.num_cols) == (rows, cols), (width, height)
        if canvas != choose_canvas((height, width), [(h, w) for h, w in PINPOINTS]):
            differ.add((width, height))
    # The order of equals decides where every canvas enlarges the image, or shows nothing of it.
    assert {(w, h) for w, h in differ if min(w, h) >= 24} == {
        (w, h) for w, h in [*SIZES, *SMALL, *ROUNDED] if min(w, h) >= 24 and max(w, h) <= 336
    }


@pytest.mark.parametrize(
    ("width", "height", "transformers", "authors"),
    [
        (300, 200, 1464, 976),
        (200, 300, 984, 1476),
        (336, 336, 1176, 1176),
        (100, 100, 1176, 1176),
        (336, 168, 1752, 876),
        (337, 200, 1560, 1560),
        (640, 480, 2340, 2340),
        # The second difference: a product of floats that is a little less than a whole number.
        (748, 352, 1848, 1800),
        (752, 1786, 2026, 1976),
    ],
)
def test_small_images_have_other_numbers_of_tokens(width, height, transformers, authors):
    hf = find_recipe("llava-next")[0].image
    assert hf.tiles is not None and hf.tiles.follows == "transformers"
    seen = [layout_by_spec(width, height, i).num_visual_tokens for i in (hf, authors_image())]
    assert seen == [transformers, authors]
