"""Shards answered by a Ray cluster, as tasks of one thread each.

The answers are those of one process, and which worker has given one leaves no trace in the records.
Ray starts and ends the processes; the work of a lost worker is asked again.
"""

from __future__ import annotations

import logging
import textwrap
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from gap_export.errors import GapExportError, UsageError
from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.records import Record
from gap_export.evaluation.workers import Shard
from gap_export.evaluation.workers.node_files import files_of
from gap_export.evaluation.workers.ray_connection import ray_connection, reach
from gap_export.evaluation.workers.ray_worker import Reply, RunnerFactory, worker_task
from gap_export.extras import pip_install, require_extra
from gap_export.progress import Progress, SilentProgress
from gap_export.version import __version__

_log = logging.getLogger(__name__)
# One loss is an accident, two may be; a shard that three workers died of would end them all.
_MAX_LOSSES = 3
# A worker has its next shard before it has answered the one before, and so never waits.
_AHEAD = 2
# Between looks at the connection, where nothing happens.
_WAIT_S = 10.0
# A cluster that grows on demand needs minutes for a node.
_START_S = 600.0
_NAMED_QUESTIONS = 5


class RayExecutor:
    """Answers shards in a Ray cluster; an ``Executor``.

    Args:
        address: ``ray://host:port`` or ``host:port`` of a cluster to join, which is left as it was;
            None to start one on this machine for as long as shards are answered.
        num_workers: CPUs of a cluster that is started here; None for as many as there are.
        options: How questions are asked; with one thread in any case.
        progress: Progress reporter: shows when the cluster is started or joined.
        runner_factory: Makes what answers shards.

    Nothing is started or joined yet; what cannot be is refused before other work is done for it.

    Raises:
        MissingDependencyError: Ray is not installed.
        UsageError: no worker at all, a backend that does not run on CPUs, or no cluster at the
            address.
    """

    def __init__(
        self,
        address: str | None,
        num_workers: int | None,
        options: RunnerOptions,
        progress: Progress | None = None,
        *,
        runner_factory: RunnerFactory = Runner,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise UsageError("too few workers", seen=num_workers, allowed=">= 1")
        if options.backend != "onnxruntime":
            raise UsageError(
                "workers of a Ray cluster run on CPUs",
                seen=options.backend,
                allowed="onnxruntime",
                fix="leave --workers out",
            )
        require_extra("ray", "an evaluation with several workers")
        if address is not None:
            reach(address)
        self._address = address
        self._num_workers = num_workers
        self._runner = (runner_factory, replace(options, num_threads=1))
        self._progress = progress or SilentProgress()

    def run(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Record]]]:
        """Answer shards, each exactly once, in the order they become ready.

        However it ends, even by an interruption, the workers are gone afterwards; a cluster that
        was joined is as before.

        Yields:
            A shard and one record for each of its questions.

        Raises:
            UsageError: the cluster cannot be had; a node has not got the files, or has another
                version of gap-export.
            GapExportError: what the runner raises; three workers were lost over one shard; no
                worker starts; the connection is lost.
        """
        if not shards:
            return
        with ExitStack() as held:
            title = "starting Ray" if self._address is None else "joining the Ray cluster"
            with self._progress.stage(title):
                num_workers = held.enter_context(ray_connection(self._address, self._num_workers))
            try:
                yield from _answer(shards, self._runner, held, most=_AHEAD * num_workers)
            except ConnectionError as err:
                raise GapExportError("the connection to the Ray cluster is lost", seen=err) from err


def _answer(
    shards: Sequence[Shard],
    runner: tuple[RunnerFactory, RunnerOptions],
    held: ExitStack,
    *,
    most: int,
) -> Iterator[tuple[Shard, list[Record]]]:
    """Have at most so many shards in the cluster, until each is answered.

    Args:
        shards: At least one.
        runner: Makes the runner of a worker, and with what options.
        held: Ends what is still asked when it is left.
        most: Shards that run, or wait for a CPU.
    """
    import ray
    from ray import cloudpickle
    from ray.exceptions import RayError, RayTaskError

    # One CPU each, and evenly over the nodes. What is lost is asked again here, where losses are
    # counted, for any reason.
    task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(worker_task())
    sent_runner = ray.put(cloudpickle.dumps(runner))
    waiting, losses = deque(range(len(shards))), Counter[int]()
    running: dict[Future[Any], tuple[int, Any]] = {}
    held.callback(_cancel, running)
    _check_start(task)
    while waiting or running:
        if not ray.is_initialized():
            # Before Ray is asked for anything: without a connection it would make another one.
            raise ConnectionError("it did not come back")
        while waiting and len(running) < most:
            number = waiting.popleft()
            work = cloudpickle.dumps((shards[number], files_of(shards[number])))
            reply = task.remote(__version__, sent_runner, work)
            running[reply.future()] = number, reply
        # Python's own futures: an interruption while Ray itself waits can end in a SystemError.
        done, _ = wait(running, timeout=_WAIT_S, return_when=FIRST_COMPLETED)
        answered = []
        for future in done:
            number, _ = running.pop(future)
            try:
                answered.append((number, _records(*future.result())))
            except RayTaskError:
                # A bug of ours, not the end of a worker: another would do no better.
                raise
            except RayError as err:
                losses[number] += 1
                _check_losses(shards[number], losses[number], err)
                waiting.appendleft(number)
        for number, records in answered:
            yield shards[number], records


def _check_start(task: Any) -> None:
    """Wait for the first worker, which does nothing.

    Raises:
        UsageError: its node has another version of gap-export.
        GapExportError: it ends while it starts, or none has started for minutes.
    """
    from ray.exceptions import RayError

    try:
        _records(*task.remote(__version__, None, None).future().result(timeout=_START_S))
    except FutureTimeout as err:
        raise GapExportError(
            f"no worker has started in the Ray cluster for {_START_S / 60:g} minutes",
            allowed="a free CPU for each worker",
            fix="wait until the cluster has nothing else to do, or see `ray status`",
        ) from err
    except RayError as err:
        raise GapExportError(
            "a worker of the Ray cluster ends while it starts", seen=_last_line(err)
        ) from err


def _records(node: str, other_version: str | None, reply: Reply) -> list[Record]:
    """The records of a reply.

    Raises:
        UsageError: the node has another version of gap-export.
        GapExportError: what the worker raised.
    """
    if other_version is not None:
        raise UsageError(
            f"the node {node} has another gap-export than this machine",
            seen=other_version,
            allowed=__version__,
            fix=f"install that one there, for Ray's Python, as it was here: {pip_install()}",
        )
    if reply.error is not None:
        raise reply.error
    return reply.records


def _check_losses(shard: Shard, num_losses: int, err: Exception) -> None:
    """Log that the worker of a shard was lost.

    Raises:
        GapExportError: it was the last of several.
    """
    cause = _last_line(err)
    names = [question.id for question in shard.questions[:_NAMED_QUESTIONS]]
    rest = len(shard.questions) - len(names)
    asked = (
        f"{shard.setting.name}, questions {', '.join(names)}{f' and {rest} more' if rest else ''}"
    )
    if num_losses >= _MAX_LOSSES:
        raise GapExportError(
            f"{_MAX_LOSSES} workers were lost, one after the other, over the same questions",
            seen=f"{asked}; the last one: {cause}",
            fix="a worker may have too little memory, take fewer of them; or ask these "
            "questions without --workers to see what goes wrong",
        )
    _log.warning("a worker was lost; what it had is asked again: %s: %s", asked, cause)


def _last_line(err: Exception) -> str:
    """What Ray knows of a loss, in one line and without its guesses."""
    *_, last = str(err).strip().splitlines() or [type(err).__name__]
    return textwrap.shorten(last.partition(" Some common causes")[0], 300)


def _cancel(running: Mapping[Future[Any], tuple[int, Any]]) -> None:
    """End the tasks, with the workers that are at them."""
    import ray

    # Where the connection is lost, the cluster ends them.
    with suppress(ConnectionError):
        for _, reply in running.values():
            if ray.is_initialized():
                ray.cancel(reply, force=True)
