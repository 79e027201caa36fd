from __future__ import annotations

import pytest

from gap_export.errors import GapExportError
from gap_export.evaluation.workers.shard_queue import MAX_LOSSES, ShardQueue
from tests.evaluation.workers.fake_runners import make_shards


def test_shards_are_handed_out_in_order_and_once():
    queue = ShardQueue(make_shards(3))
    assert [queue.take() for _ in range(3)] == [0, 1, 2]
    assert (queue.num_waiting, queue.num_unfinished) == (0, 3)
    for number in (1, 0, 2):
        queue.finish(number)
    assert queue.num_unfinished == 0


def test_what_is_put_back_comes_first():
    queue = ShardQueue(make_shards(4))
    first, second = queue.take(), queue.take()
    queue.put_back(second)
    queue.lose(first, "it died")
    assert [queue.take() for _ in range(4)] == [0, 1, 2, 3]
    assert queue.num_unfinished == 4


def test_a_shard_that_three_workers_were_lost_over_is_named():
    shards = make_shards(3, per_shard=7)
    queue = ShardQueue(shards)
    assert MAX_LOSSES == 3
    for _ in range(2):
        queue.lose(queue.take(), "it died")
    with pytest.raises(GapExportError) as caught:
        queue.lose(queue.take(), "out of memory")
    assert str(caught.value) == (
        "3 workers were lost, one after the other, over the same questions: "
        "unpruned, questions 0-0, 0-1, 0-2, 0-3, 0-4 and 2 more; the last one: out of memory; "
        "a worker may have too little memory, take fewer of them; or ask these questions "
        "without --workers to see what goes wrong"
    )


def test_losses_of_other_shards_and_what_was_put_back_do_not_count():
    queue = ShardQueue(make_shards(2))
    for _ in range(2):
        first, second = queue.take(), queue.take()
        queue.put_back(second)
        queue.lose(first, "it died")
    queue.finish(queue.take())
    for _ in range(2):
        queue.lose(queue.take(), "it died")
    queue.finish(queue.take())
    assert queue.num_unfinished == 0


def test_a_shard_that_is_not_out_cannot_be_finished():
    queue = ShardQueue(make_shards(2))
    number = queue.take()
    queue.finish(number)
    with pytest.raises(KeyError):
        queue.finish(number)
