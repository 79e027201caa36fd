"""A node's thread: the newest image, and an account of all."""

from __future__ import annotations

import threading
import time

import pytest

from gap_export.runtime.session import GroundingSession
from gap_export.streaming.ros import NewestAnswerer
from tests.streaming.ros.bag_files import STAMPS, image_message, scene


@pytest.fixture(scope="module")
def session(tiny_bundle):
    with GroundingSession.open(tiny_bundle) as opened:
        yield opened


class Published:
    """What was published, and a gate that holds the thread."""

    def __init__(self):
        self.items, self.errors = [], []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, header, groundings):
        self.entered.set()
        assert self.gate.wait(10)
        self.items.append((header, groundings))


def start(session, published, *expressions):
    return NewestAnswerer(
        session, published, expressions=expressions, report=published.errors.append
    )


def wait_for(condition):
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_answers_are_the_sessions_and_have_the_images_header(session):
    published = Published()
    answerer = start(session, published, "the red circle", "the star")
    message = image_message(scene(), stamp=STAMPS[1])
    answerer.offer(message)
    wait_for(lambda: answerer.status.answered == 1)
    assert answerer.close(10)
    ((header, groundings),) = published.items
    assert header is message.header
    expected = session.ground_batch(scene(), ["the red circle", "the star"])
    assert [one.token_ids for one in groundings] == [one.token_ids for one in expected]
    assert answerer.status.last_ms > 0


def test_the_newest_image_is_answered_and_the_others_are_counted(session):
    published = Published()
    answerer = start(session, published, "the red circle")
    published.gate.clear()
    messages = [image_message(scene(), stamp=(n, 0)) for n in range(6)]
    answerer.offer(messages[0])
    assert published.entered.wait(10)
    for message in messages[1:]:
        answerer.offer(message)
    published.gate.set()
    wait_for(lambda: answerer.status.answered == 2)
    assert answerer.close(10)
    assert [header.stamp.sec for header, _ in published.items] == [0, 5]
    status = answerer.status
    assert (status.received, status.dropped, status.failed) == (6, 4, 0)


def test_an_image_that_cannot_be_used_is_reported_and_the_next_is_answered(session):
    published = Published()
    answerer = start(session, published, "the red circle")
    answerer.offer(image_message(scene(), "bayer_rggb8"))
    wait_for(lambda: answerer.status.failed == 1)
    assert "bayer_rggb8" in answerer.status.last_error == published.errors[0]
    answerer.offer(image_message(scene()))
    wait_for(lambda: answerer.status.answered == 1)
    assert answerer.status.last_error is None
    answerer.close(10)


def test_what_publishing_raises_does_not_end_the_thread(session):
    def fail(header, groundings):
        raise RuntimeError("the context is gone")

    errors = []
    answerer = NewestAnswerer(session, fail, expressions=["a star"], report=errors.append)
    for count in (1, 2):
        answerer.offer(image_message(scene()))
        wait_for(lambda count=count: answerer.status.failed == count)
    assert errors == ["RuntimeError('the context is gone')"] * 2
    assert answerer.close(10)


def test_without_an_expression_images_are_dropped(session):
    published = Published()
    answerer = start(session, published)
    answerer.offer(image_message(scene()))
    assert (answerer.status.received, answerer.status.dropped) == (1, 1)
    answerer.set_expressions(["the star"])
    answerer.offer(image_message(scene()))
    wait_for(lambda: answerer.status.answered == 1)
    assert published.items[0][1][0].expression == "the star"
    answerer.close(10)
