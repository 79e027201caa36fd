"""Sessions on images cut into tiles: what is fed, what is counted, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gap_export.errors import BundleError, ExpressionError
from gap_export.runtime.drawing import draw_grounding
from gap_export.runtime.images.image import load_image, prepare_image
from gap_export.runtime.images.preparations import tile_layout
from gap_export.runtime.session import GroundingSession
from gap_export.spec.tiles import TileTokens
from tests.runtime.fake_backends import EditedBackend, prefilled_embeds

KEPT = [0, 3, 6, 9, 12]
N = 16


def test_prompt_holds_base_tile_then_rows_each_with_its_newline(
    tiled_manifest, make_session, make_backend, image
):
    (fed,) = prefilled_embeds(make_session(tiled_manifest), image, ["the star"])
    spec = tiled_manifest.image
    pixels, geometry = prepare_image(load_image(image, pad_color=spec.pad_color), spec)
    layout = tile_layout(geometry, spec, tiled_manifest.grid)
    assert layout is not None
    assert len(pixels) == layout.num_tiles
    seen = make_backend(tiled_manifest).run("vision_encoder", {"pixel_values": pixels})
    features = seen["image_features"]
    expected = list(features[0])
    for row in range(layout.first_row, layout.first_row + layout.num_rows):
        for col in range(layout.first_col, layout.first_col + layout.num_cols):
            tile = 1 + row // 4 * layout.tile_cols + col // 4
            cell = row % 4 * 4 + col % 4
            if cell in KEPT:
                expected.append(features[tile, KEPT.index(cell)])
        expected.append(np.full(8, 0.5, np.float32))
    prefix, suffix = 2, 3
    assert (fed[prefix : len(fed) - suffix] == np.stack(expected)).all()


def test_ids_are_those_of_the_unpruned_tiled_sequence(tiled_manifest, make_session, image):
    session = make_session(tiled_manifest)
    answer = session.ground(image, "the star")
    (ids,) = vars(session.backend)["ids_seen"][0]
    total = answer.num_visual_tokens
    assert ids[:2].tolist() == [0, 1]
    assert ids[2:-3].tolist() == [2 + index for index in answer.keep_indices]
    assert ids[-3:].tolist() == [2 + total, 3 + total, 4 + total]
    # Decode goes on from the unpruned length.
    assert vars(session.backend)["ids_seen"][1].tolist() == [[5 + total]]


def test_answer_counts_tokens_tile_by_tile(tiled_manifest, make_session):
    wide = np.zeros((32, 64, 3), np.uint8)
    answer = make_session(tiled_manifest).ground(wide, "the star")
    base, tiles = answer.tokens
    assert (base.view, base.rows, base.cols, base.kept) == ("base", 4, 4, tuple(KEPT))
    assert base.tiles == (TileTokens(num_visual_tokens=N, num_kept_tokens=5),)
    assert (tiles.view, tiles.rows, tiles.cols) == ("tiles", 4, 8)
    assert (tiles.frame.left, tiles.frame.top) == (0, 0)
    assert (tiles.frame.width, tiles.frame.height) == (64, 32)
    assert tiles.tiles == (
        TileTokens(num_visual_tokens=N, num_kept_tokens=5),
        TileTokens(num_visual_tokens=N, num_kept_tokens=5, num_newline_tokens=4),
    )
    # Of a tile's 4x4 cells, in the joined 4x8: the right tile's lie 4 columns further right.
    assert sorted(tiles.kept) == sorted(
        cell // 4 * 8 + cell % 4 + shift for cell in KEPT for shift in (0, 4)
    )
    assert answer.num_visual_tokens == N + 4 * 9
    assert len(answer.keep_indices) == 5 + 10 + 4
    plain = answer.to_plain()["tokens"]
    assert [view["view"] for view in plain] == ["base", "tiles"]
    assert plain[1]["tiles"][1]["num_newline_tokens"] == 4


def test_tokens_in_padding_are_dropped_and_counted(tiled_manifest, make_session):
    # Square enough for 64x64, and fitted to 64 columns and 48 rows: 2 rows of padding each side
    # of 8 rows of 8 pixels.
    answer = make_session(tiled_manifest).ground(np.zeros((48, 64, 3), np.uint8), "the star")
    _, tiles = answer.tokens
    assert (tiles.rows, tiles.cols) == (6, 8)
    assert sum(tile.num_padding_tokens for tile in tiles.tiles) > 0
    kept = sum(tile.num_kept_tokens - tile.num_padding_tokens for tile in tiles.tiles)
    assert len(tiles.kept) == kept
    assert len(answer.keep_indices) == 5 + kept + 6


EXPRESSIONS = ["the star", "the small red circle above the star", "blue square"]


def test_batch_sees_the_tiles_once(tiled_manifest, make_session, image):
    session = make_session(tiled_manifest)
    alone = [session.ground(image, expression) for expression in EXPRESSIONS]
    vars(session.backend)["calls"].clear()
    together = session.ground_batch(image, EXPRESSIONS)
    assert vars(session.backend)["calls"].count("vision_encoder") == 1
    for one, other in zip(alone, together, strict=True):
        assert (one.token_ids, one.tokens) == (other.token_ids, other.tokens)
    assert len({answer.token_ids for answer in together}) > 1


def test_text_reading_pruner_sees_the_tiles_once_an_expression(
    tiled_text_manifest, make_session, image
):
    session = make_session(tiled_text_manifest)
    alone = [session.ground(image, expression) for expression in EXPRESSIONS]
    vars(session.backend)["feeds"].clear()
    together = session.ground_batch(image, EXPRESSIONS)
    feeds = [feed for feed in vars(session.backend)["feeds"] if "pixel_values" in feed]
    shapes = [(len(feed["pixel_values"]), feed["text_embeds"].shape) for feed in feeds]
    assert all((feed["text_embeds"] == feed["text_embeds"][:1]).all() for feed in feeds)
    num_tiles = sum(len(grid.tiles) for grid in together[0].tokens)
    assert shapes == [(num_tiles, (num_tiles, 8))] * 3
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.keep_indices == other.keep_indices
    assert len({answer.keep_indices for answer in together}) > 1


def test_compact_positions_are_the_slots(tiled_manifest, make_session, image):
    session = make_session(tiled_manifest, positions="compact")
    session.ground(image, "the star")
    (ids,) = vars(session.backend)["ids_seen"][0]
    assert ids.tolist() == list(range(len(ids)))


def test_context_is_counted_with_the_image_s_own_length(tiled_manifest, make_session):
    def session(limit: int) -> GroundingSession:
        decoder = dataclasses.replace(tiled_manifest.decoder, max_position_embeddings=limit)
        return make_session(dataclasses.replace(tiled_manifest, decoder=decoder))

    wide, square = np.zeros((32, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    # 5 of text, 8 for the answer; 16 + 4 * 9 = 52 or 16 + 8 * 9 = 88 of the image.
    session(65).ground(wide, "the star")
    with pytest.raises(ExpressionError, match=r"93 position ids.*allowed: 65 in all"):
        session(65).ground(square, "the star")
    with pytest.raises(ExpressionError, match=r"57 position ids.*allowed: 64 in all"):
        session(64).ground(wide, "the star")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 5000), (33, 31)])
def test_image_of_any_shape_is_answered_and_drawn(tiled_manifest, make_session, size):
    image = Image.new("RGB", size, "teal")
    answer = make_session(tiled_manifest).ground(image, "the star")
    assert answer.image_size == size
    assert answer.keep_indices[-1] < answer.num_visual_tokens
    assert max(draw_grounding(image, answer).size) >= 512


def test_vision_encoder_that_leaves_out_a_tile_is_refused(tiled_manifest, make_session, image):
    session = make_session(tiled_manifest)
    session.backend = EditedBackend(session.backend, "image_features", lambda found: found[:-1])
    with pytest.raises(BundleError, match=r"not of the manifest's shape.*allowed: \[3, 5, 8\]"):
        session.ground(image, "the star")
