"""What a step found: items that ran, were not run, or failed; written down after each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gap_export.errors import GapExportError, UsageError

Outcome = Literal["ran", "not run", "failed"]
Figures = dict[str, Any]


class NotRunError(Exception):
    """What an item needs is not on this machine; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that a step does.

    Attributes:
        name: Unique in its step.
        outcome: ``failed`` where it was begun and something went wrong.
        reason: Why it did not run; empty where it did.
        seconds: Wall time.
        figures: What it found, as JSON knows it.
    """

    name: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)


class StepRecord:
    """The items of one step, in a file, so that what ran stays when a later one hangs.

    Args:
        path: Of the file; what ran before is read from it and is not done again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.items: dict[str, Item] = {item.name: item for item in read_items(path)}

    def do(self, name: str, work: Callable[[], Figures]) -> Figures | None:
        """Do one thing, unless it was done; whatever goes wrong with it is a finding.

        Args:
            name: Of the item.
            work: Gives its figures.

        Returns:
            The figures, or None where it did not run.
        """
        known = self.items.get(name)
        if known is not None and known.outcome == "ran":
            return known.figures
        start, outcome, reason, figures = time.monotonic(), "ran", "", {}
        try:
            figures = work()
        except (NotRunError, UsageError, ImportError) as err:
            outcome, reason = "not run", _line(err)
        except (GapExportError, OSError, RuntimeError, ValueError, MemoryError) as err:
            # PyTorch's and ONNX Runtime's own errors are RuntimeErrors.
            outcome, reason = "failed", f"{type(err).__name__}: {_line(err)}"
        self.put(
            Item(
                name=name,
                outcome=outcome,  # type: ignore[arg-type]
                reason=reason,
                seconds=round(time.monotonic() - start, 2),
                figures=figures,
            )
        )
        return figures if outcome == "ran" else None

    def put(self, item: Item) -> None:
        """Write an item down in place of one of its name."""
        self.items[item.name] = item
        write_json(self._path, [asdict(each) for each in self.items.values()])


def read_items(path: Path) -> list[Item]:
    """What a step's file holds; nothing where there is none."""
    return [Item(**plain) for plain in json.loads(path.read_text())] if path.is_file() else []


def write_json(path: Path, plain: Any) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:500] or type(err).__name__
