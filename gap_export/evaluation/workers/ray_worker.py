"""What runs in a worker of a Ray cluster: it answers one shard after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gap_export.errors import GapExportError
from gap_export.evaluation.records import Record
from gap_export.evaluation.workers import Shard
from gap_export.evaluation.workers.node_files import NodeFiles, check_files

if TYPE_CHECKING:
    from gap_export.evaluation.measure import RunnerOptions


class AnswersShards(Protocol):
    """A runner: ``gap_export.evaluation.measure.Runner``, or a test's."""

    def answer(self, shard: Shard) -> list[Record]:
        """One record for each question, in order."""
        ...


RunnerFactory = Callable[["RunnerOptions"], AnswersShards]


def make_runner(options: RunnerOptions) -> AnswersShards:
    """The runner that opens bundles."""
    # In the worker: the process that asks needs no session.
    from gap_export.evaluation.measure import Runner

    return Runner(options)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What comes back of a shard.

    Attributes:
        records: One for each question; empty with an error.
        error: Raised on purpose while the shard was answered. As a value, since Ray would wrap
            what is raised in an error of its own.
    """

    records: list[Record]
    error: GapExportError | None = None


class ShardWorker:
    """Holds a runner, and with it the bundles that were opened."""

    def __init__(self, runner: AnswersShards, node: str) -> None:
        self._runner = runner
        self._node = node

    def answer(self, shard: Shard, files: NodeFiles) -> Reply:
        """Answer a shard.

        Args:
            shard: Its paths are absolute.
            files: Those that must be on this node.
        """
        try:
            check_files(files, self._node)
            return Reply(records=self._runner.answer(shard))
        except GapExportError as err:
            # Whatever it was, it must survive the way back.
            err.seen = None if err.seen is None else str(err.seen)
            return Reply(records=[], error=err)


def actor_class() -> type[Any]:
    """The class that Ray makes an actor of.

    It is defined in here so that Ray sends its code along: on a node without gap-export, or with
    another version of it, the class must be there to say so.
    """

    class Actor:
        def __init__(self) -> None:
            self._worker: Any = None

        def start(self, version: str, runner: bytes) -> tuple[str, str | None]:
            """Make the runner.

            Args:
                version: Of gap-export where the evaluation was started.
                runner: A RunnerFactory and its RunnerOptions, pickled.

            Returns:
                The node's name, and its version of gap-export where that is another one: then
                there is no runner.
            """
            import socket

            import ray
            from ray import cloudpickle

            node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
            try:
                from gap_export.version import __version__
            except ModuleNotFoundError:
                return node, "none"
            if __version__ != version:
                return node, __version__
            from gap_export.evaluation.workers.ray_worker import ShardWorker

            make, options = cloudpickle.loads(runner)
            self._worker = ShardWorker(make(options), node)
            return node, None

        def answer(self, shard: Any, files: Any) -> Any:
            return self._worker.answer(shard, files)

    return Actor
