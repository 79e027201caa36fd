"""Which shards wait, which are at a worker, and which have cost workers their life."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from gap_export.errors import GapExportError
from gap_export.evaluation.workers import Shard

# One loss is an accident, two may be; a shard that three workers died of would end them all.
MAX_LOSSES = 3
_NAMED_QUESTIONS = 5


class ShardQueue:
    """Hands out shards until each has been finished once.

    A shard is known by its number, its place in the sequence given.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._waiting = deque(range(len(shards)))
        self._taken: set[int] = set()
        self._losses: Counter[int] = Counter()

    @property
    def num_waiting(self) -> int:
        """Shards that no worker has."""
        return len(self._waiting)

    @property
    def num_unfinished(self) -> int:
        """Shards that wait or are at a worker."""
        return len(self._waiting) + len(self._taken)

    def take(self) -> int:
        """The next shard to be answered; there must be one that waits."""
        number = self._waiting.popleft()
        self._taken.add(number)
        return number

    def finish(self, number: int) -> None:
        """A shard that was taken has been answered."""
        self._taken.remove(number)

    def put_back(self, number: int) -> None:
        """A shard that was taken comes first again; its worker was lost before it began."""
        self._taken.remove(number)
        self._waiting.appendleft(number)

    def lose(self, number: int, cause: str) -> None:
        """A worker was lost over a shard that was taken; it comes first again.

        Args:
            number: Of the shard.
            cause: What is known of the loss, one line.

        Raises:
            GapExportError: it is the third worker that was lost over this shard.
        """
        self._losses[number] += 1
        if self._losses[number] >= MAX_LOSSES:
            raise GapExportError(
                f"{MAX_LOSSES} workers were lost, one after the other, over the same questions",
                seen=f"{_describe(self._shards[number])}; the last one: {cause}",
                fix="a worker may have too little memory, take fewer of them; or ask these "
                "questions without --workers to see what goes wrong",
            )
        self.put_back(number)


def _describe(shard: Shard) -> str:
    names = [question.id for question in shard.questions[:_NAMED_QUESTIONS]]
    rest = len(shard.questions) - len(names)
    more = f" and {rest} more" if rest else ""
    return f"{shard.setting.name}, questions {', '.join(names)}{more}"
