"""How questions are cut into shards, and how this process answers them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.settings import Setting
from gap_export.evaluation.workers import cut_shards
from tests.evaluation.answers import question

SETTING = Setting(
    name="unpruned", bundle=Path("b"), pruner="none", keep_ratio=1.0, positions="none"
)


def questions(*per_image):
    return [
        replace(question((0, 0, 1, 1)), id=f"{image}-{n}", image_id=str(image))
        for image, number in enumerate(per_image)
        for n in range(number)
    ]


@pytest.mark.parametrize(
    ("per_image", "sizes"),
    [
        ([4, 4, 4, 4], [4, 4, 4, 4]),
        ([2, 3, 1, 1, 1, 1, 1], [5, 4, 1]),
        ([9, 1], [9, 1]),
        ([1, 9], [10]),
        ([], []),
    ],
)
def test_shards_end_with_an_image(per_image, sizes):
    asked = questions(*per_image)
    shards = cut_shards(SETTING, asked, size=4)
    assert [len(shard.questions) for shard in shards] == sizes
    assert [shard.index for shard in shards] == list(range(len(sizes)))
    assert [one for shard in shards for one in shard.questions] == asked
    images = [{one.image_id for one in shard.questions} for shard in shards]
    assert sum(map(len, images)) == len(set().union(*images))


def test_this_process_answers_in_the_order_given_and_closes_what_it_opened(monkeypatch):
    events = []
    monkeypatch.setattr(Runner, "answer", lambda self, shard: [shard.index])
    monkeypatch.setattr(Runner, "close", lambda self: events.append("closed"))
    shards = cut_shards(SETTING, questions(4, 4, 4), size=4)
    results = Runner(RunnerOptions(seed=3)).run(shards)
    assert next(results) == (shards[0], [0])
    assert events == []
    results.close()
    assert events == ["closed"]
