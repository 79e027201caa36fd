"""Answering the questions of an evaluation, in this process or in the workers of a Ray cluster.

Work is cut into the same shards for both, so the answers are the same as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from gap_export.evaluation.questions import AnyQuestion
from gap_export.evaluation.records import Record
from gap_export.evaluation.settings import Setting

__all__ = ["SHARD_SIZE", "Executor", "Shard", "cut_shards"]

# Small enough that little is lost with a worker, large enough that handing it out costs nothing.
SHARD_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A piece of work.

    Attributes:
        setting: What is asked.
        index: 0, 1, 2, ... within the setting.
        questions: At least one; all of an image's are in one shard.
    """

    setting: Setting
    index: int
    questions: tuple[AnyQuestion, ...]


class Executor(Protocol):
    """Gets shards answered."""

    def run(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Record]]]:
        """Answer shards, in any order, each exactly once.

        Yields:
            A shard and one record for each of its questions, in their order.

        Raises:
            GapExportError: a setting cannot be run at all.
        """
        ...


def cut_shards(
    setting: Setting,
    questions: Sequence[AnyQuestion],
    *,
    size: int = SHARD_SIZE,
) -> list[Shard]:
    """Cut questions, those of one image together, into shards that end once they have that size."""
    pieces: list[tuple[AnyQuestion, ...]] = []
    current: list[AnyQuestion] = []
    for _, group in groupby(questions, key=lambda question: question.image_id):
        current += group
        if len(current) >= size:
            pieces.append(tuple(current))
            current = []
    if current:
        pieces.append(tuple(current))
    return [
        Shard(setting=setting, index=index, questions=piece) for index, piece in enumerate(pieces)
    ]
