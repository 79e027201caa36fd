"""Images of answers: what is dimmed, what is bright, where the box is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.errors import ImageError, OutputError
from gap_export.runtime.drawing import draw_grounding, heat_color, save_drawing, token_box
from gap_export.runtime.grounding import Grounding, TokenGrid
from gap_export.runtime.images.geometry import Frame
from gap_export.spec.tiles import TileTokens

YELLOW = (255, 225, 0)


@pytest.fixture
def answer() -> Grounding:
    """On a 4x4 grid over a 64x64 image, the left half was kept."""
    return Grounding(
        expression="the star",
        box=(40.0, 8.0, 56.0, 24.0),
        text="[0.6, 0.1, 0.9, 0.4]",
        token_ids=(1, 2),
        keep_indices=(0, 1, 4, 5, 8, 9, 12, 13),
        num_visual_tokens=16,
        tokens=(grid_of(4, 4, (0, 1, 4, 5, 8, 9, 12, 13), width=64, height=64),),
        image_size=(64, 64),
        timings_ms={"total": 1.0},
        backend="numpy",
        warnings=(),
    )


def grid_of(
    rows: int, cols: int, kept: tuple[int, ...], *, width: float, height: float, view: Any = "image"
) -> TokenGrid:
    return TokenGrid(
        view=view,
        rows=rows,
        cols=cols,
        frame=Frame(left=0, top=0, width=width, height=height),
        kept=kept,
        tiles=(TileTokens(num_visual_tokens=rows * cols, num_kept_tokens=len(kept)),),
    )


def draw(answer: Grounding, color: tuple[int, int, int] = (200, 40, 40)) -> Any:
    return np.asarray(draw_grounding(Image.new("RGB", (64, 64), color), answer)).astype(int)


def test_small_image_is_enlarged_and_gets_a_caption(answer):
    drawing = draw_grounding(Image.new("RGB", (64, 64)), answer)
    assert drawing.mode == "RGB"
    assert drawing.width == 512
    assert 520 < drawing.height < 600
    assert np.asarray(drawing)[512:].max() > 200


def test_large_image_is_shrunk(answer):
    tokens = (grid_of(4, 4, (0, 1), width=5000, height=9),)
    big = dataclasses.replace(answer, box=None, tokens=tokens)
    assert draw_grounding(Image.new("RGB", (5000, 9)), big).width == 2048


def test_kept_tokens_are_bright_and_dropped_ones_dim_and_gray(answer):
    drawing = draw(dataclasses.replace(answer, box=None))
    assert drawing[60, 60].tolist() == [200, 40, 40]
    assert drawing[450, 200].tolist() == [200, 40, 40]
    red, green, blue = drawing[60, 450]
    assert red == green == blue
    assert 60 < red < 140


@pytest.mark.parametrize(
    "shades", [(5, 60), (110, 150), (200, 250)], ids="dark even bright".split()
)
def test_what_was_dropped_can_still_be_told(answer, shades):
    pixels = np.full((64, 64, 3), shades[0], np.uint8)
    pixels[32:] = shades[1]
    drawing = np.asarray(draw_grounding(pixels, dataclasses.replace(answer, box=None))).astype(int)
    upper, lower = drawing[64, 450, 0], drawing[450, 450, 0]
    assert 60 <= upper < lower <= 165
    assert lower - upper >= 0.35 * (shades[1] - shades[0])
    # What was kept is as it was.
    assert drawing[[64, 450], 60, 0].tolist() == list(shades)


def test_kept_tokens_are_outlined(answer):
    drawing = draw(dataclasses.replace(answer, box=None))
    # A token covers 128 pixels of the enlarged image.
    assert drawing[60, [0, 127, 128, 255]].tolist() == [[255, 255, 255]] * 4
    assert drawing[60, 384].tolist() != [255, 255, 255]


def test_nothing_is_dimmed_or_outlined_where_all_was_kept(answer):
    tokens = (grid_of(4, 4, tuple(range(16)), width=64, height=64),)
    whole = dataclasses.replace(answer, box=None, tokens=tokens)
    assert (draw(whole)[:512] == [200, 40, 40]).all()


def test_box_is_drawn_where_it_is(answer):
    drawing = draw(answer)
    rows, cols = np.nonzero((drawing[:512] == YELLOW).all(axis=-1))
    assert (cols.min(), rows.min(), cols.max(), rows.max()) == (320, 64, 448, 192)
    assert not (draw(dataclasses.replace(answer, box=None)) == YELLOW).all(axis=-1).any()


def test_token_box_follows_the_padded_square():
    frame = Frame(left=0, top=-20, width=80, height=80)
    assert token_box(0, (4, 4), frame) == (0, -20, 20, 0)
    assert token_box(6, (4, 4), frame) == (40, 0, 60, 20)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3000, 40)])
def test_image_of_any_shape_is_drawn(answer, size):
    tokens = (grid_of(4, 4, (0, 5), width=size[0], height=size[1]),)
    odd = dataclasses.replace(answer, tokens=tokens, box=(0.0, 0.0, 0.4, 0.4))
    drawing = draw_grounding(Image.new("RGB", size), odd)
    assert max(drawing.size) >= 512


def test_long_expression_is_cut_to_fit(answer):
    long = dataclasses.replace(answer, expression="the very " * 200 + "small star")
    assert draw_grounding(Image.new("RGB", (64, 64)), long).width == 512


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_drawing_is_saved_and_nothing_beside_it(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    for _ in range(2):
        assert save_drawing(Image.new("RGB", (9, 5), "red"), path) == path
    with Image.open(path) as saved:
        assert saved.size == (9, 5)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.txt"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(OutputError, match=r"not saved in that format.*allowed: \.png"):
        save_drawing(Image.new("RGB", (9, 5)), tmp_path / name)


def test_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for folder in ("missing", "file"):
        with pytest.raises(OutputError, match=r"the drawing is to be in .*no(t exist| folder)"):
            save_drawing(Image.new("RGB", (9, 5)), tmp_path / folder / "x.png")


def test_image_that_cannot_be_used_is_refused(answer, tmp_path):
    with pytest.raises(ImageError, match="no such image"):
        draw_grounding(tmp_path / "missing.png", answer)


def test_uneven_grid_gives_uneven_cells(answer):
    # 32 rows of 8 columns: on 512 pixels a token is 16 high and 64 wide.
    tokens = (grid_of(32, 8, (8 * 3 + 2,), width=64, height=64),)
    drawing = draw(dataclasses.replace(answer, box=None, tokens=tokens))
    bright = (drawing[:512].max(axis=-1) > 100).nonzero()
    assert (bright[0].min(), bright[0].max() + 1) == (48, 64)
    assert (bright[1].min(), bright[1].max() + 1) == (128, 192)


def tiled(answer: Grounding, base: tuple[int, ...], tiles: tuple[int, ...]) -> Grounding:
    tokens = (
        grid_of(2, 2, base, width=64, height=64, view="base"),
        grid_of(4, 4, tiles, width=64, height=64, view="tiles"),
    )
    return dataclasses.replace(answer, box=None, tokens=tokens)


def test_tiles_are_shown_large_and_the_base_tile_below(answer):
    drawing = draw(tiled(answer, base=(3,), tiles=(0,)))
    red = (drawing == [200, 40, 40]).all(axis=-1)
    # Of the tiles the upper left 128 pixels, of the base tile the lower right quarter of 205.
    assert red[10:118, 10:118].all()
    assert not red[:512, 130:].any()
    rows, cols = red[512:].nonzero()
    assert (cols.min(), cols.max()) == (103, 203)
    assert rows.max() - rows.min() == 100


def test_base_tile_is_beside_a_tall_image(answer):
    image = Image.new("RGB", (100, 512), (200, 40, 40))
    drawing = draw_grounding(image, tiled(answer, base=(0,), tiles=(0,)))
    assert drawing.width > 140
    assert drawing.height < 600


def test_base_tile_is_left_out_where_nothing_was_dropped(answer):
    whole = tiled(answer, base=tuple(range(4)), tiles=tuple(range(16)))
    drawing = draw(whole)
    assert (drawing[:512] == [200, 40, 40]).all()
    assert len(drawing) < 600


def test_tiles_that_show_nothing_of_a_thin_image_are_left_out(answer):
    tokens = (
        grid_of(2, 2, (0,), width=640, height=1, view="base"),
        grid_of(0, 4, (), width=640, height=0, view="tiles"),
    )
    thin = dataclasses.replace(answer, box=None, tokens=tokens)
    assert draw_grounding(Image.new("RGB", (640, 1)), thin).width == 640


def test_scores_are_a_heat_map_aside(answer):
    scores = tuple(float(index) for index in range(16))
    scored = dataclasses.replace(answer.tokens[0], scores=scores)
    plain = draw(dataclasses.replace(answer, box=None), color=(0, 0, 0))
    heat = draw(dataclasses.replace(answer, box=None, tokens=(scored,)), color=(0, 0, 0))
    assert heat.shape[0] > plain.shape[0] + 200
    top = 512 + 512 // 128
    side = round(512 * 0.4) / 4
    first = heat[top + round(side / 2), round(side / 2)]
    last = heat[top + round(3.5 * side), round(3.5 * side)]
    # Its scale is in the caption: from black at the left to white.
    strip = heat[heat.shape[0] - 30 :]
    scale = (strip[..., 0] > 200) & (strip[..., 1] < 60)
    assert scale.sum() > 100
    assert not ((plain[512:, :, 0] > 200) & (plain[512:, :, 1] < 60)).any()
    assert first.tolist() == [0, 0, 0]
    assert last.tolist() == [int(0.65 * 255)] * 3


@pytest.mark.parametrize("size", [(64, 64), (100, 400), (60, 600), (1, 700)])
def test_the_scale_has_both_its_ends_below_an_image_of_any_width(answer, size):
    scored = dataclasses.replace(answer.tokens[0], scores=tuple(-1.23e-05 * n for n in range(16)))
    thin = dataclasses.replace(answer, box=None, tokens=(scored,))
    strip = np.asarray(draw_grounding(Image.new("RGB", size), thin))[-22:].astype(int)
    yellow = ((strip[..., 0] > 240) & (strip[..., 1] > 240) & (strip[..., 2] < 60)).any(axis=0)
    right = strip[:, yellow.nonzero()[0].max() :]
    # Behind the scale the highest score, and then nothing.
    assert ((right > 200).all(axis=-1)).sum() > 100
    assert (right[:, -4:] == 24).all()


def test_equal_scores_are_drawn_alike(answer):
    scored = dataclasses.replace(answer.tokens[0], scores=(0.25,) * 16)
    assert draw(dataclasses.replace(answer, tokens=(scored,))).shape[0] > 700


@pytest.mark.parametrize(
    ("share", "color"),
    [(0.0, (0, 0, 0)), (1 / 3, (255, 0, 0)), (2 / 3, (255, 255, 0)), (1.0, (255, 255, 255))],
)
def test_heat_runs_from_black_by_red_and_yellow_to_white(share, color):
    assert heat_color(share) == color
