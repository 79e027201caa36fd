"""What runs in a worker of a Ray cluster: it answers one shard after the other."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from gap_export.errors import GapExportError
from gap_export.evaluation.measure import RunnerOptions
from gap_export.evaluation.records import Record
from gap_export.evaluation.workers import Shard
from gap_export.evaluation.workers.node_files import check_files


class AnswersShards(Protocol):
    """A runner: ``gap_export.evaluation.measure.Runner``, or one of a test."""

    def answer(self, shard: Shard) -> list[Record]:
        """One record for each question, in order."""
        ...


RunnerFactory = Callable[[RunnerOptions], AnswersShards]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a shard.

    Attributes:
        records: One for each question; empty with an error.
        error: Raised on purpose while the shard was answered. As a value, since Ray would wrap
            an exception in an error of its own.
    """

    records: list[Record] = field(default_factory=list)
    error: GapExportError | None = None


def worker_task() -> Callable[..., Any]:
    """The function that Ray runs for each shard.

    It is defined in here so that Ray sends its code along: a node without gap-export, or with
    another version of it, must be able to say so. Its arguments are bytes for the same reason.
    """

    def answer(version: str, runner: bytes | None, work: bytes | None) -> tuple[str, Any, Any]:
        """Answer a shard.

        Args:
            version: Version of gap-export where the evaluation was started.
            runner: A RunnerFactory and its RunnerOptions, pickled.
            work: The shard and the files it needs, pickled; None to answer nothing.

        Returns:
            The node's name, its version of gap-export where that is another one, and a Reply.
        """
        import socket

        import ray

        node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        try:
            from gap_export.version import __version__
        except ModuleNotFoundError:
            return node, "none", None
        if __version__ != version:
            return node, __version__, None
        from gap_export.evaluation.workers.ray_worker import Reply, answer_pickled

        if runner is None or work is None:
            return node, None, Reply()
        return node, None, answer_pickled(runner, work, node)

    return answer


def answer_pickled(runner: bytes, work: bytes, node: str) -> Reply:
    """Answer a shard on a node that has this version of gap-export."""
    shard, files = pickle.loads(work)  # noqa: S301 - from the process that asks
    try:
        check_files(files, node)
        return Reply(records=_runner_of(runner).answer(shard))
    except GapExportError as err:
        # It is pickled on the way back, which any value seen must survive.
        err.seen = None if err.seen is None else str(err.seen)
        return Reply(error=err)


@lru_cache(maxsize=1)
def _runner_of(pickled: bytes) -> AnswersShards:
    """One for each process: it keeps bundles open from shard to shard."""
    make, options = pickle.loads(pickled)  # noqa: S301 - from the process that asks
    runner: AnswersShards = make(options)
    return runner
