"""What both stages share: optimisers, a schedule by wall clock, checkpoints and the log."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger("train_refshapes")

OptimizerName = Literal["adamw", "muon"]
WARMUP_STEPS = 60
_WEIGHT_DECAY = 0.02
_SAVE_EVERY_SECONDS = 180.0


@dataclass(kw_only=True)
class Clock:
    """Progress by wall clock: a run of M minutes ends after M minutes on any machine.

    Attributes:
        minutes: Budget.
        elapsed: Seconds spent so far, earlier processes included, monitoring excluded.
        step: Steps taken so far.
    """

    minutes: float
    elapsed: float = 0.0
    step: int = 0
    _mark: float = field(default_factory=time.monotonic)

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0..1."""
        return min(1.0, self.elapsed / (60 * self.minutes))

    def tick(self) -> None:
        """Count the time since the last tick."""
        now = time.monotonic()
        self.elapsed += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Forget the time since the last tick."""
        self._mark = time.monotonic()

    def learning_rate(self, peak: float, *, hold: float, floor: float) -> float:
        """Linear warm-up, constant until `hold` of the budget, then a cosine down to `floor`."""
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        falling = max(0.0, (self.progress - hold) / (1 - hold))
        return peak * warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * falling)))


def build_optimizers(
    modules: Iterable[nn.Module], name: OptimizerName, *, hidden: Iterable[nn.Module]
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of `hidden` and AdamW for the rest.

    Args:
        modules: Everything that is trained.
        name: "adamw" or "muon".
        hidden: Stacks of transformer layers within `modules`.

    Returns:
        One or two optimisers that share a learning rate (Muon's updates are scaled to AdamW's).
    """
    every = {p: None for m in modules for p in m.parameters() if p.requires_grad}
    inner = {p for m in hidden for p in m.parameters() if p.requires_grad and p.dim() == 2}
    by_muon = [p for p in every if p in inner] if name == "muon" else []
    by_adamw = [p for p in every if name != "muon" or p not in inner]
    groups = [
        {"params": [p for p in by_adamw if p.dim() >= 2], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in by_adamw if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
    ]
    if by_muon:
        optimizers.append(
            torch.optim.Muon(
                by_muon, lr=1e-3, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def take_step(
    loss: Tensor, optimizers: Iterable[torch.optim.Optimizer], rate: float, clip: float
) -> float:
    """Backward, clip, update; returns the norm of the gradient before clipping."""
    optimizers = list(optimizers)
    loss.backward()
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return float(norm)


@dataclass(kw_only=True)
class Checkpointer:
    """Everything a stage needs to go on after being killed, in one file.

    Attributes:
        path: The file.
        modules: What is trained, and what it needs frozen, by name.
        optimizers: Their optimisers.
        clock: The stage's clock.
        facts: Settings of the stage, kept for the model card.
    """

    path: Path
    modules: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]
    clock: Clock
    facts: dict[str, float | int | str]
    _saved: float = field(default_factory=time.monotonic)

    def resume(self) -> bool:
        """Load the file if there is one; says whether there was."""
        if not self.path.exists():
            return False
        state = load_state(self.path)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        self.clock.elapsed, self.clock.step = state["elapsed"], state["step"]
        logger.info("resumed %s at step %d", self.path.name, self.clock.step)
        return True

    def save_if_due(self) -> None:
        """Save when the last time is long enough ago."""
        if time.monotonic() - self._saved > _SAVE_EVERY_SECONDS:
            self.save(finished=False)

    def save(self, *, finished: bool) -> None:
        """Write atomically: a killed process leaves the previous file whole."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "elapsed": self.clock.elapsed,
            "step": self.clock.step,
            "finished": finished,
            "facts": {
                **self.facts,
                "steps": self.clock.step,
                "minutes": round(self.clock.elapsed / 60, 1),
                "finished": finished,
            },
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)
        self._saved = time.monotonic()


def load_state(path: Path) -> dict[str, Any]:
    """Read a file written by `Checkpointer.save`."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Averages:
    """Means of the figures since the last report."""

    def __init__(self) -> None:
        """Start empty."""
        self._values: defaultdict[str, list[float]] = defaultdict(list)
        self._since = time.monotonic()
        self._steps = 0

    def add(self, **figures: float | Tensor) -> None:
        """Record one step's figures; NaN ones are skipped."""
        self._steps += 1
        for name, value in figures.items():
            if not math.isnan(number := float(value)):
                self._values[name].append(number)

    def report(self, stage: str, clock: Clock, rate: float) -> None:
        """Log the means and start afresh."""
        pace = (time.monotonic() - self._since) / max(self._steps, 1)
        means = " ".join(f"{k} {sum(v) / len(v):.3f}" for k, v in self._values.items())
        logger.info(
            "%s step %d minute %.1f %.2fs/step lr %.1e %s",
            stage, clock.step, clock.elapsed / 60, pace, rate, means,
        )  # fmt: skip
        self._values.clear()
        self._since, self._steps = time.monotonic(), 0
