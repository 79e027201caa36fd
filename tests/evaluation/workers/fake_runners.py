"""Runners that open no bundle, for the workers of a Ray cluster, and shards for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.questions import ImageSource, Question
from gap_export.evaluation.records import Record
from gap_export.evaluation.settings import Setting
from gap_export.evaluation.workers import Shard
from gap_export.evaluation.workers.ray_worker import AnswersShards


def make_shards(count: int, *, per_shard: int = 2) -> list[Shard]:
    """Shards 0, 1, ... of questions ``0-0``, ``0-1``, ``1-0``, ... about drawn images."""
    setting = Setting(
        name="unpruned", bundle=Path("bundle"), pruner="none", keep_ratio=1.0, positions="none"
    )
    return [
        Shard(
            setting=setting,
            index=index,
            questions=tuple(make_question(f"{index}-{n}", index) for n in range(per_shard)),
        )
        for index in range(count)
    ]


def make_question(name: str, index: int, image: ImageSource | None = None) -> Question:
    return Question(
        id=name,
        image_id=str(index),
        image=image or ImageSource(scene=("heldout", 0, index, 4)),
        expression=f"the red square {name}",
        box=(0.0, 0.0, 1.0, 1.0),
        image_size=None,
        kind=None,
        split="heldout",
    )


@dataclass(frozen=True)
class Fake:
    """A runner and its factory: the answer to each question is the process that has answered it.

    Attributes:
        before: Called with each shard before it is answered.
    """

    before: Callable[[Shard], None] | None = None

    def __call__(self, options: RunnerOptions) -> AnswersShards:
        assert options.num_threads == 1
        return self

    def answer(self, shard: Shard) -> list[Record]:
        if self.before is not None:
            self.before(shard)
        return [
            Record(
                question_id=question.id,
                text=str(os.getpid()),
                fractions=None,
                box=None,
                image_size=(1, 1),
                num_kept_tokens=1,
                num_visual_tokens=1,
            )
            for question in shard.questions
        ]


@dataclass(frozen=True)
class HalfWay:
    """A runner factory: the real runner, which stops after its first shard.

    It begins when so many workers can, and goes on when there is a file ``go on``.

    Attributes:
        folder: Where each worker leaves a file, named after its node, that holds its process id;
            and another one, ``<process id> waits``, when it is at its second shard.
        count: How many workers there are to be.
    """

    folder: Path
    count: int

    def __call__(self, options: RunnerOptions) -> AnswersShards:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.folder / node).write_text(str(os.getpid()))
        return _HalfWayRunner(Runner(options), self)


class _HalfWayRunner:
    def __init__(self, runner: Runner, plan: HalfWay) -> None:
        self._runner = runner
        self._plan = plan
        self._has_answered = False

    def answer(self, shard: Shard) -> list[Record]:
        folder = self._plan.folder
        if self._has_answered:
            (folder / f"{os.getpid()} waits").touch()
            wait_for((folder / "go on").exists)
        else:
            wait_for(lambda: len(list(folder.iterdir())) >= self._plan.count)
        self._has_answered = True
        return self._runner.answer(shard)


def wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def by_question(answers: Iterator[tuple[Shard, list[Record]]]) -> dict[str, Record]:
    """Records by question, each there once and in the order of its shard."""
    found: dict[str, Record] = {}
    for shard, records in answers:
        ids: Sequence[str] = [record.question_id for record in records]
        assert ids == [question.id for question in shard.questions]
        assert not found.keys() & set(ids)
        found.update(zip(ids, records, strict=True))
    return found
