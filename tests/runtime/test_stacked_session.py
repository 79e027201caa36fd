"""Sessions on images whose tiles follow each other, the thumbnail last."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gap_export.runtime.drawing import draw_grounding
from gap_export.runtime.images.image import load_image, prepare_image
from gap_export.spec.tiles import TileTokens
from tests.runtime.fake_backends import prefilled_embeds

KEPT = [0, 3, 6, 9, 12]
N = 16
EXPRESSIONS = ["the star", "the small red circle above the star"]


def test_prompt_holds_tile_after_tile_and_no_newline(
    stacked_manifest, make_session, make_backend, image
):
    (fed,) = prefilled_embeds(make_session(stacked_manifest), image, ["the star"])
    spec = stacked_manifest.image
    pixels, geometry = prepare_image(load_image(image, pad_color=spec.pad_color), spec)
    # 40 x 24 is nearest to 3 x 2.
    assert geometry.canvas == (64, 96) and len(pixels) == 7
    seen = make_backend(stacked_manifest).run("vision_encoder", {"pixel_values": pixels})
    assert (fed[2:-3] == seen["image_features"].reshape(-1, 8)).all()


def test_ids_are_those_of_the_unpruned_stack(stacked_manifest, make_session, image):
    session = make_session(stacked_manifest)
    answer = session.ground(image, "the star")
    assert answer.num_visual_tokens == 7 * N
    expected = [tile * N + index for tile in range(7) for index in KEPT]
    assert list(answer.keep_indices) == expected
    (ids,) = vars(session.backend)["ids_seen"][0]
    total = 7 * N
    assert ids.tolist() == [
        0,
        1,
        *(2 + index for index in expected),
        *(2 + total + n for n in (0, 1, 2)),
    ]
    assert vars(session.backend)["ids_seen"][1].tolist() == [[5 + total]]


def test_answer_has_the_thumbnail_s_grid_and_that_of_the_tiles(stacked_manifest, make_session):
    answer = make_session(stacked_manifest).ground(np.zeros((20, 40, 3), np.uint8), "the star")
    thumbnail, tiles = answer.tokens
    assert (thumbnail.view, thumbnail.rows, thumbnail.cols) == ("base", 4, 4)
    assert thumbnail.kept == tuple(KEPT) and len(thumbnail.tiles) == 1
    assert (tiles.view, tiles.rows, tiles.cols, len(tiles.tiles)) == ("tiles", 4, 8, 2)
    # Of the right tile's cells each lies 4 columns further right in the joined grid.
    assert sorted(tiles.kept) == sorted(c // 4 * 8 + c % 4 + s for c in KEPT for s in (0, 4))
    for grid in answer.tokens:
        assert (grid.frame.left, grid.frame.top) == (0, 0)
        assert (grid.frame.width, grid.frame.height) == (40, 20)
        assert set(grid.tiles) == {TileTokens(num_visual_tokens=N, num_kept_tokens=5)}


def test_rows_of_tiles_are_told_apart(stacked_manifest, make_session):
    answer = make_session(stacked_manifest).ground(np.zeros((60, 40, 3), np.uint8), "the star")
    tiles = answer.tokens[1]
    assert (tiles.rows, tiles.cols) == (12, 8)
    expected = {
        (down * 4 + cell // 4) * 8 + across * 4 + cell % 4
        for down in range(3) for across in range(2) for cell in KEPT
    }  # fmt: skip
    assert set(tiles.kept) == expected and len(tiles.kept) == len(expected)


def test_image_of_one_tile_has_one_grid_and_no_thumbnail(stacked_manifest, make_session):
    session = make_session(stacked_manifest)
    answer = session.ground(np.zeros((30, 30, 3), np.uint8), "the star")
    (grid,) = answer.tokens
    assert (grid.view, grid.rows, grid.cols, grid.kept) == ("image", 4, 4, tuple(KEPT))
    assert (answer.num_visual_tokens, answer.keep_indices) == (N, tuple(KEPT))
    assert (grid.frame.width, grid.frame.height) == (30, 30)


def test_batch_equals_single_questions_and_sees_the_tiles_once(
    stacked_manifest, make_session, image
):
    session = make_session(stacked_manifest)
    alone = [session.ground(image, expression) for expression in EXPRESSIONS]
    vars(session.backend)["calls"].clear()
    together = session.ground_batch(image, EXPRESSIONS)
    assert vars(session.backend)["calls"].count("vision_encoder") == 1
    assert vars(session.backend)["calls"].count("newline") == 0
    for one, other in zip(alone, together, strict=True):
        assert (one.token_ids, one.tokens) == (other.token_ids, other.tokens)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (33, 31)])
def test_image_of_any_shape_is_answered_and_drawn(stacked_manifest, make_session, size):
    image = Image.new("RGB", size, "teal")
    answer = make_session(stacked_manifest).ground(image, "the star")
    assert answer.keep_indices[-1] < answer.num_visual_tokens
    assert max(draw_grounding(image, answer).size) >= 512
