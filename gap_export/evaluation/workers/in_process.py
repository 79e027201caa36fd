"""Answering shards in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.records import Record
from gap_export.evaluation.workers import Shard


class InProcessExecutor:
    """Implements :class:`gap_export.evaluation.workers.Executor`."""

    def __init__(self, options: RunnerOptions) -> None:
        """Nothing is opened yet.

        Args:
            options: How questions are asked.
        """
        self._options = options

    def run(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Record]]]:
        """Answer shards in the order given, which should keep those of a bundle together.

        Yields:
            A shard and one record for each of its questions, in their order.

        Raises:
            GapExportError: a bundle cannot be run.
        """
        with Runner(self._options) as runner:
            for shard in shards:
                yield shard, runner.answer(shard)
