"""Shards answered by the workers of a Ray cluster.

The answers are those of one process: every worker runs one thread, and which worker has answered a
shard leaves no trace in the records. A worker that is lost is replaced, and what it had is asked
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from gap_export.errors import GapExportError, UsageError
from gap_export.evaluation.records import Record
from gap_export.evaluation.workers import Shard
from gap_export.evaluation.workers.ray_connection import ray_connection, reach
from gap_export.evaluation.workers.ray_crew import RayCrew
from gap_export.evaluation.workers.ray_worker import RunnerFactory, make_runner
from gap_export.extras import require_extra
from gap_export.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from gap_export.evaluation.measure import RunnerOptions


class RayExecutor:
    """Answers shards in a Ray cluster; an ``Executor``.

    Args:
        address: ``ray://host:port`` or ``host:port`` of a cluster to join, which is left as it was;
            None to start one on this machine for as long as shards are answered.
        num_workers: None for as many as the cluster, or this machine, has CPUs.
        options: Of the runner in each worker; of one thread whatever they say.
        progress: Told when the cluster is started or joined. How many shards are answered its
            caller knows.
        runner_factory: Makes what answers shards.

    Nothing is started or joined yet; what cannot be is refused before other work is done for it.

    Raises:
        MissingDependencyError: Ray is not installed.
        UsageError: no worker at all, a backend that does not run on CPUs, or nobody at the address.
    """

    def __init__(
        self,
        address: str | None,
        num_workers: int | None,
        options: RunnerOptions,
        progress: Progress | None = None,
        *,
        runner_factory: RunnerFactory = make_runner,
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
        self._options = replace(options, num_threads=1)
        self._progress = progress or SilentProgress()
        self._runner_factory = runner_factory

    def run(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Record]]]:
        """Answer shards, each exactly once, in the order they become ready.

        Whatever ends it, an interruption as well, the workers are gone afterwards, and a cluster
        that was joined is as before.

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
            from ray import cloudpickle

            crew = RayCrew(num_workers, cloudpickle.dumps((self._runner_factory, self._options)))
            held.callback(crew.dismiss)
            try:
                yield from crew.answer(shards)
            except ConnectionError as err:
                raise GapExportError("the connection to the Ray cluster is lost", seen=err) from err
