"""Frames in, answers out."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from PIL import Image

from gap_export.errors import ExpressionError, UsageError
from gap_export.runtime.session import GroundingSession
from gap_export.streaming import SourceFrame, answer_frames, newest_frames
from gap_export.streaming.newest import NewestSlot
from gap_export.streaming.same_frame import sameness, summarize

EXPRESSIONS = ["the red circle", "the small star"]


@pytest.fixture(scope="module")
def session(tiny_bundle):
    with GroundingSession.open(tiny_bundle) as opened:
        yield opened


def scene(shift=0, size=(60, 80)):
    pixels = np.full((*size, 3), 90, np.uint8)
    pixels[10:20, 10 + shift : 20 + shift] = (250, 40, 40)
    return pixels


def frames_of(*images):
    return [
        SourceFrame(index=n, time_s=n / 10, name="video", image=image)
        for n, image in enumerate(images)
    ]


def test_each_frame_has_the_answers_of_the_session(session):
    frames = frames_of(scene(), scene(30))
    answers = list(answer_frames(session, frames, EXPRESSIONS))
    for frame, answer in zip(frames, answers, strict=True):
        asked = [session.ground(frame.image, words) for words in EXPRESSIONS]
        assert [one.token_ids for one in answer.groundings] == [one.token_ids for one in asked]
        assert answer.outcome == "answered" and answer.sameness is None


def test_a_frame_that_is_the_same_is_skipped_and_says_so(session):
    noise = np.random.default_rng(0).integers(-6, 7, (60, 80, 3))
    noisy = np.clip(scene() + noise, 0, 255).astype(np.uint8)
    frames = frames_of(scene(), noisy, scene(30), scene(30))
    answers = list(answer_frames(session, frames, EXPRESSIONS, same_frame=0.95))
    assert [one.outcome for one in answers] == ["answered", "skipped", "answered", "skipped"]
    plain = [one.to_plain() for one in answers]
    assert plain[1]["same_as"] == 0 and plain[3]["same_as"] == 2
    assert plain[1]["skipped"] == "shows what frame 0 showed"
    assert plain[1]["sameness"] < 1.0 == plain[3]["sameness"]
    assert "groundings" not in plain[1] and answers[1].groundings == answers[0].groundings


def test_frames_are_compared_with_the_last_one_that_was_answered(session):
    # Each differs little from the one before, and the last much from the first.
    frames = frames_of(*(np.full((8, 8, 3), 4 * n, np.uint8) for n in range(5)))
    answers = answer_frames(session, frames, EXPRESSIONS, same_frame=0.96)
    assert [one.same_as for one in answers] == [None, 0, 0, None, 3]


def test_a_frame_of_another_size_is_another_frame(session):
    frames = frames_of(scene(), scene(size=(61, 80)))
    answers = answer_frames(session, frames, EXPRESSIONS, same_frame=0.1)
    assert [one.outcome for one in answers] == ["answered", "answered"]


def test_a_frame_that_cannot_be_used_is_named_and_the_next_is_answered(session, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no image")
    broken = SourceFrame(index=7, time_s=None, name="v", image=None, error="the frame is damaged")
    answers = list(answer_frames(session, [*frames_of(path), broken, *frames_of(scene())], ["a"]))
    assert [one.outcome for one in answers] == ["failed", "failed", "answered"]
    assert "not an image that can be read" in answers[0].to_plain()["error"]
    assert answers[1].to_plain()["error"] == "the frame is damaged"


def test_an_expression_that_cannot_be_used_ends_it(session):
    with pytest.raises(ExpressionError):
        list(answer_frames(session, frames_of(scene()), ["  "]))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(session, share):
    with pytest.raises(UsageError, match="is no share"):
        list(answer_frames(session, frames_of(scene()), EXPRESSIONS, same_frame=share))


def test_sameness_is_that_of_the_cell_that_differs_most():
    one, other = np.zeros((2, 32, 32, 3), np.uint8)
    assert sameness(one, other) == 1.0
    other[3, 4, 1] = 51
    assert sameness(one, other) == sameness(other, one) == pytest.approx(0.8)
    other[3, 4, 1] = 255
    assert sameness(one, other) == 0.0


def test_cells_are_means():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:2, 0] = 200
    cells = summarize(Image.fromarray(pixels))
    assert cells.shape == (32, 32, 3) and cells[0, 0, 0] == 100 and cells[1:].max() == 0


def test_the_newest_frame_is_delivered_and_the_others_are_counted():
    go, delivered = threading.Event(), threading.Event()

    def camera():
        yield frames_of(None)[0]
        assert go.wait(5)
        yield from frames_of(None, None, None, None)[1:]
        delivered.set()

    with newest_frames(camera(), paced=False) as frames:
        first = next(frames)
        go.set()
        assert delivered.wait(5)
        found = [first, *frames]
    assert [(frame.index, frame.num_dropped) for frame in found] == [(0, 0), (3, 2)]


def test_what_a_source_raises_is_raised_where_frames_are_taken():
    def camera():
        yield frames_of(None)[0]
        raise UsageError("the source ended")

    with newest_frames(camera(), paced=False) as frames, pytest.raises(UsageError, match="ended"):
        list(frames)


def test_a_file_runs_at_its_own_speed():
    began = time.monotonic()
    with newest_frames(iter(frames_of(None, None, None)), paced=True) as frames:
        assert sum(1 + frame.num_dropped for frame in frames) == 3
    assert time.monotonic() - began >= 0.2


def test_leaving_ends_the_thread_of_a_source_that_sends_on():
    def camera():
        while True:
            time.sleep(0.001)
            yield frames_of(None)[0]

    with newest_frames(camera(), paced=False) as frames:
        next(frames)
    assert not any(thread.name == "frames" for thread in threading.enumerate())


def test_a_slot_that_is_closed_gives_what_is_left():
    slot = NewestSlot()
    slot.put("a")
    slot.close()
    assert slot.take() == ("a", 0)
    assert slot.take() is None
