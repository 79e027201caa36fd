"""The workers of one evaluation in a Ray cluster: started, given shards, replaced when lost."""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from gap_export.errors import GapExportError, UsageError
from gap_export.evaluation.records import Record
from gap_export.evaluation.workers import Shard
from gap_export.evaluation.workers.node_files import files_of, with_absolute_paths
from gap_export.evaluation.workers.ray_worker import actor_class
from gap_export.evaluation.workers.shard_queue import MAX_LOSSES, ShardQueue
from gap_export.extras import pip_install
from gap_export.version import __version__

_log = logging.getLogger(__name__)
# A worker has its next shard before it has answered the one before, and so never waits.
_AHEAD = 2
# Between looks at the clock, where nothing happens.
_WAIT_S = 10.0
# A cluster that grows on demand needs minutes for a node.
_START_S = 600.0


@dataclass(eq=False, kw_only=True)
class _Worker:
    """An actor, and what it was asked and has not answered, in order.

    Attributes:
        actor: Ray's handle.
        tasks: Numbers of shards, None for the start. The actor is at the first of them.
        node: Where it runs, once it has started.
    """

    actor: Any
    tasks: list[int | None] = field(default_factory=list)
    node: str | None = None


# Who has ended which task, and how.
_Event = tuple[_Worker, int | None, Future[Any]]


class RayCrew:
    """Workers in the Ray cluster that this process is connected to.

    Args:
        num_workers: How many there are at most.
        runner: A RunnerFactory and its RunnerOptions, pickled by value.
    """

    def __init__(self, num_workers: int, runner: bytes) -> None:
        import ray

        # One CPU each, and as evenly over the nodes as these have CPUs. A worker that is lost is
        # replaced here, where it is known what it was at.
        hire = ray.remote(
            num_cpus=1, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._actor: Any = hire(actor_class())
        self._num_workers = num_workers
        self._runner = runner
        self._workers: list[_Worker] = []
        # Ray's threads put in what has happened. Python's own queue is what is waited for, since an
        # interruption while Ray waits can end in a SystemError.
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._failed_starts = 0
        self._none_since = time.monotonic()

    def answer(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Record]]]:
        """Answer shards, each exactly once, in the order they become ready.

        Yields:
            A shard and one record for each of its questions.

        Raises:
            UsageError: a node has not got the files, or has another version of gap-export.
            GapExportError: what the runner raises; three workers were lost over one shard; no
                worker starts.
            ConnectionError: that to the cluster is lost.
        """
        queue = ShardQueue(shards)
        while queue.num_unfinished:
            self._check_connection()
            self._hire(min(self._num_workers, queue.num_unfinished))
            self._hand_out(shards, queue)
            for number, records in self._collect(queue):
                yield shards[number], records

    def dismiss(self) -> None:
        """End all workers, whatever they are at."""
        import ray

        # Where the connection is lost, the cluster ends them.
        if ray.is_initialized():
            with suppress(ConnectionError):
                for worker in self._workers:
                    ray.kill(worker.actor)
        self._workers.clear()

    def _check_connection(self) -> None:
        """Look before Ray is asked for anything: without a connection it would make another one.

        Raises:
            ConnectionError: there is none any more.
        """
        import ray

        if not ray.is_initialized():
            raise ConnectionError("it did not come back")

    def _hire(self, wanted: int) -> None:
        """Have as many workers as are wanted, those that still start included.

        Raises:
            GapExportError: for minutes none has started.
        """
        while len(self._workers) < wanted:
            worker = _Worker(actor=self._actor.remote())
            self._workers.append(worker)
            self._ask(worker, None, worker.actor.start.remote(__version__, self._runner))
        now = time.monotonic()
        if any(worker.node is not None for worker in self._workers):
            self._none_since = now
        elif now - self._none_since > _START_S:
            raise GapExportError(
                f"no worker has started in the Ray cluster for {_START_S / 60:g} minutes",
                allowed="a free CPU for each worker",
                fix="wait until the cluster has nothing else to do, or see `ray status`",
            )

    def _hand_out(self, shards: Sequence[Shard], queue: ShardQueue) -> None:
        for ahead in range(_AHEAD):
            # Of the last few shards a worker has one only: the next is for another to take.
            spare = len(self._workers) if ahead else 0
            for worker in self._workers:
                if worker.node is None or len(worker.tasks) > ahead or queue.num_waiting <= spare:
                    continue
                number = queue.take()
                shard = with_absolute_paths(shards[number])
                self._ask(worker, number, worker.actor.answer.remote(shard, files_of(shard)))

    def _ask(self, worker: _Worker, number: int | None, reply: Any) -> None:
        """Note that a worker has a task, and have its end put among the events."""
        worker.tasks.append(number)
        events = self._events
        reply.future().add_done_callback(lambda done: events.put((worker, number, done)))

    def _collect(self, queue: ShardQueue) -> Iterator[tuple[int, list[Record]]]:
        """Wait for something to happen, though not for ever, and see what it was."""
        from ray.exceptions import RayError, RayTaskError

        try:
            worker, number, done = self._events.get(timeout=_WAIT_S)
        except Empty:
            return
        if worker not in self._workers:
            # Lost already, with the task that it was at.
            return
        try:
            reply = done.result()
        except RayTaskError:
            # A bug of ours, not the end of a worker: another would do no better.
            raise
        except RayError as err:
            self._lose(worker, queue, err)
            return
        worker.tasks.remove(number)
        if number is None:
            self._welcome(worker, *reply)
            return
        if reply.error is not None:
            raise reply.error
        queue.finish(number)
        yield number, reply.records

    def _welcome(self, worker: _Worker, node: str, other_version: str | None) -> None:
        """A worker has started.

        Raises:
            UsageError: its node has another version of gap-export.
        """
        if other_version is not None:
            raise UsageError(
                f"the node {node} has another gap-export than this machine",
                seen=other_version,
                allowed=__version__,
                fix=f"install that one there, for Ray's Python, as it was here: {pip_install()}",
            )
        worker.node = node
        self._failed_starts = 0

    def _lose(self, worker: _Worker, queue: ShardQueue, err: Exception) -> None:
        """A worker, or its node, is gone: others get what it had.

        Raises:
            GapExportError: no worker starts at all, or this shard has ended three of them.
        """
        import ray

        cause = _describe(err)
        self._workers.remove(worker)
        # Where it is merely out of reach, it must not go on.
        ray.kill(worker.actor)
        at, *after = worker.tasks
        if at is None:
            self._failed_starts += 1
            if self._failed_starts >= MAX_LOSSES * self._num_workers:
                raise GapExportError("workers of the Ray cluster end while they start", seen=cause)
            return
        for number in reversed(after):
            assert number is not None, "only the first task is the start"
            queue.put_back(number)
        queue.lose(at, cause)
        _log.warning(
            "a worker on %s was lost; its %d shard(s) are asked again: %s",
            worker.node,
            len(worker.tasks),
            cause,
        )


def _describe(err: Exception) -> str:
    """What Ray knows of a loss, in one line and without its guesses."""
    *_, last = str(err).strip().splitlines() or [type(err).__name__]
    return textwrap.shorten(last.partition(" Some common causes")[0], 300)
