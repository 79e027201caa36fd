"""The line before a model: who goes first, who goes together, who goes away."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack

import pytest

from gap_export.serving.problems import RefusedError
from gap_export.serving.waiting import Ticket, WaitingLine


def ticket(key: str, *expressions: str, deadline: float = 60.0, **more: object) -> Ticket:
    return Ticket(
        key=key,
        expressions=expressions or ("a",),
        deadline=time.monotonic() + deadline,
        **{"positions": None, **more},
    )


@pytest.fixture
def line():
    return WaitingLine(batch=4)


@pytest.fixture
def stand(line):
    """Lets tickets stand in line, as requests do."""
    with ExitStack() as requests:

        def stand(*tickets: Ticket) -> None:
            for one in tickets:
                requests.enter_context(line.admitted(one))
                line.put(one)

        yield stand


def status_of(future: Future[object]) -> int:
    error = future.exception(timeout=0)
    assert isinstance(error, RefusedError)
    return error.status


def test_what_is_about_the_image_of_the_first_goes_with_it(line, stand):
    first, other, same = ticket("x"), ticket("y"), ticket("x", "b")
    stand(first, other, same)
    assert line.take() == [first, same]
    assert line.take() == [other]
    assert len(line) == 0


def test_no_more_go_together_than_a_batch_holds(line, stand):
    first, large, small = ticket("x", "a", "b"), ticket("x", *"cde"), ticket("x", "f", "g")
    stand(first, large, small)
    assert line.take() == [first, small]
    assert line.take() == [large]


def test_a_ticket_larger_than_a_batch_goes_alone(line, stand):
    large, small = ticket("x", *"abcdef"), ticket("x")
    stand(large, small)
    assert line.take() == [large]


def test_other_positions_go_apart(line, stand):
    first, compact = ticket("x"), ticket("x", positions="compact")
    stand(first, compact)
    assert line.take() == [first]


def test_what_is_past_its_deadline_is_answered_and_never_taken(line, stand):
    late, early = ticket("x", deadline=-1), ticket("x")
    stand(late, early)
    assert line.take() == [early]
    assert status_of(late.answer) == 504


def test_an_older_frame_that_waits_gives_way(line, stand):
    old, new = ticket("1", stream="cam"), ticket("2", stream="cam")
    other, still = ticket("3", stream="tail"), ticket("4")
    stand(old, other, still, new)
    assert status_of(old.answer) == 409
    assert [line.take() for _ in range(3)] == [[other], [still], [new]]


def test_a_frame_whose_image_is_still_decoded_gives_way_too(line):
    old, new = ticket("1", stream="cam"), ticket("2", stream="cam")
    with line.admitted(old), line.admitted(new):
        assert status_of(old.answer) == 409
        line.put(old)
        line.put(new)
        assert line.take() == [new]


def test_another_question_about_the_same_frame_stays(line, stand):
    one, two = ticket("1", stream="cam"), ticket("1", "b", stream="cam")
    stand(one, two)
    assert line.take() == [one, two]


def test_a_frame_that_runs_is_left_alone(line, stand):
    old, new = ticket("1", stream="cam"), ticket("2", stream="cam")
    stand(old)
    line.take()
    stand(new)
    assert not old.answer.done()


def test_who_leaves_is_never_taken(line, stand):
    gone, stays = ticket("x"), ticket("y")
    with line.admitted(gone):
        line.put(gone)
    assert gone.answer.cancelled() and len(line) == 0
    stand(stays)
    assert line.take() == [stays]


def test_a_closed_line_gives_what_is_in_it_and_takes_no_more(line, stand):
    last = ticket("x")
    stand(last)
    line.close()
    assert line.take() == [last]
    with pytest.raises(RefusedError, match="stopping") as refused, line.admitted(ticket("y")):
        pass
    assert refused.value.status == 503


def test_a_closed_line_waits_for_those_whose_images_are_decoded(line):
    one = ticket("x")
    taken: list[list[Ticket]] = []
    thread = threading.Thread(target=lambda: taken.extend((line.take(), line.take())))
    with line.admitted(one):
        line.close()
        thread.start()
        line.put(one)
        while not taken and thread.is_alive() and not one.answer.running():
            time.sleep(0.001)
    thread.join(10)
    assert taken == [[one], []]
