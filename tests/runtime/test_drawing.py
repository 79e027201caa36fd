"""Pictures of answers: what is dimmed, what is bright, where the box is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.errors import ImageError, OutputError
from gap_export.runtime.drawing import draw_grounding, save_drawing, token_box
from gap_export.runtime.geometry import Frame
from gap_export.runtime.grounding import Grounding

YELLOW = (255, 225, 0)


@pytest.fixture
def answer() -> Grounding:
    """On a 4x4 grid over a 64x64 picture, the left half was kept."""
    return Grounding(
        expression="the star",
        box=(40.0, 8.0, 56.0, 24.0),
        text="[0.6, 0.1, 0.9, 0.4]",
        token_ids=(1, 2),
        keep_indices=(0, 1, 4, 5, 8, 9, 12, 13),
        num_visual_tokens=16,
        grid=(4, 4),
        grid_frame=Frame(left=0, top=0, width=64, height=64),
        image_size=(64, 64),
        timings_ms={"total": 1.0},
        backend="numpy",
        warnings=(),
    )


def draw(answer: Grounding, color: tuple[int, int, int] = (200, 40, 40)) -> Any:
    return np.asarray(draw_grounding(Image.new("RGB", (64, 64), color), answer)).astype(int)


def test_small_picture_is_enlarged_and_gets_a_caption(answer: Grounding) -> None:
    drawing = draw_grounding(Image.new("RGB", (64, 64)), answer)
    assert drawing.mode == "RGB"
    assert drawing.width == 512
    assert 520 < drawing.height < 600
    assert np.asarray(drawing)[512:].max() > 200


def test_large_picture_is_shrunk(answer: Grounding) -> None:
    big = dataclasses.replace(
        answer, box=None, grid_frame=Frame(left=0, top=0, width=5000, height=9)
    )
    assert draw_grounding(Image.new("RGB", (5000, 9)), big).width == 2048


def test_kept_tokens_are_bright_and_dropped_ones_dim_and_grey(answer: Grounding) -> None:
    drawing = draw(dataclasses.replace(answer, box=None))
    assert drawing[60, 60].tolist() == [200, 40, 40]
    assert drawing[450, 200].tolist() == [200, 40, 40]
    red, green, blue = drawing[60, 450]
    assert red == green == blue
    assert red < 60


def test_kept_tokens_are_outlined(answer: Grounding) -> None:
    drawing = draw(dataclasses.replace(answer, box=None))
    # A token covers 128 pixels of the enlarged picture.
    assert drawing[60, [0, 127, 128, 255]].tolist() == [[255, 255, 255]] * 4
    assert drawing[60, 384].tolist() != [255, 255, 255]


def test_nothing_is_dimmed_or_outlined_where_all_was_kept(answer: Grounding) -> None:
    whole = dataclasses.replace(answer, box=None, keep_indices=tuple(range(16)))
    assert (draw(whole)[:512] == [200, 40, 40]).all()


def test_box_is_drawn_where_it_is(answer: Grounding) -> None:
    drawing = draw(answer)
    rows, cols = np.nonzero((drawing[:512] == YELLOW).all(axis=-1))
    assert (cols.min(), rows.min(), cols.max(), rows.max()) == (320, 64, 448, 192)
    assert not (draw(dataclasses.replace(answer, box=None)) == YELLOW).all(axis=-1).any()


def test_token_box_follows_the_padded_square() -> None:
    frame = Frame(left=0, top=-20, width=80, height=80)
    assert token_box(0, (4, 4), frame) == (0, -20, 20, 0)
    assert token_box(6, (4, 4), frame) == (40, 0, 60, 20)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3000, 40)])
def test_picture_of_any_shape_is_drawn(answer: Grounding, size: tuple[int, int]) -> None:
    frame = Frame(left=0, top=0, width=size[0], height=size[1])
    odd = dataclasses.replace(answer, grid_frame=frame, box=(0.0, 0.0, 0.4, 0.4))
    drawing = draw_grounding(Image.new("RGB", size), odd)
    assert max(drawing.size) >= 512


def test_long_expression_is_cut_to_fit(answer: Grounding) -> None:
    long = dataclasses.replace(answer, expression="the very " * 200 + "small star")
    assert draw_grounding(Image.new("RGB", (64, 64)), long).width == 512


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_drawing_is_saved_and_nothing_beside_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"older")
    assert save_drawing(Image.new("RGB", (9, 5), "red"), path) == path
    with Image.open(path) as saved:
        assert saved.size == (9, 5)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.txt"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"not saved in that format.*allowed: \.png"):
        save_drawing(Image.new("RGB", (9, 5)), tmp_path / name)


def test_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for folder in ("missing", "file"):
        with pytest.raises(OutputError, match=r"picture cannot be saved: .*x\.png"):
            save_drawing(Image.new("RGB", (9, 5)), tmp_path / folder / "x.png")


def test_picture_that_cannot_be_used_is_refused(answer: Grounding, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such picture"):
        draw_grounding(tmp_path / "missing.png", answer)
