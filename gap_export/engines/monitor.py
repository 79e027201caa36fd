"""TensorRT's progress as ours, and the way to stop a build."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from gap_export.progress import Advance

# A stage is reported as this many steps.
STEPS = 100


@dataclass
class _Phase:
    parent: str | None
    num_steps: int
    done: int = 0
    children: dict[str, float] = field(default_factory=dict)


class PhaseTally:
    """How far nested phases are, as steps of one stage; safe to call from several threads.

    TensorRT's phases are steps of other phases, and how many there will be is known only one by
    one: a phase that is under way counts as a part of its parent's next step.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._phases: dict[str, _Phase] = {}
        self._root: str | None = None
        self._told = 0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase begins."""
        with self._lock:
            if self._root is None:
                self._root = name
            self._phases[name] = _Phase(parent, max(1, num_steps))

    def step(self, name: str, index: int) -> None:
        """Step ``index`` of a phase is done."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = min(phase.num_steps, max(phase.done, index + 1))
                phase.children.clear()
                self._tell(name)

    def finish(self, name: str) -> None:
        """A phase ends, perhaps with steps left out."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = phase.num_steps
                self._tell(name)

    def _tell(self, name: str) -> None:
        """Carry a phase's share up to the outermost one, and tell what is new."""
        seen: set[str] = set()
        while name not in seen:
            seen.add(name)
            phase = self._phases[name]
            part = max(phase.children.values(), default=0.0)
            share = min(1.0, (phase.done + part) / phase.num_steps)
            if phase.parent is None or phase.parent not in self._phases:
                break
            self._phases[phase.parent].children[name] = share
            name = phase.parent
        if name == self._root:
            steps = int(share * STEPS)
            if steps > self._told:
                self._advance(steps - self._told)
                self._told = steps


def make_monitor(module: Any, tally: PhaseTally, stop: threading.Event) -> Any:
    """TensorRT's progress monitor; the build stops at its next step once ``stop`` is set.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        tally: It is given every phase.
        stop: The caller sets it to stop the build.
    """

    class _Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            # pybind11 wants the base's constructor called by its name.
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tally.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            tally.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tally.step(phase_name, step)
            return not stop.is_set()

    return _Monitor()
