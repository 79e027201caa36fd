"""Which position ids a place of a decoder's graph sees, from the values there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.float64]

# A row's own angle is told from its neighbors' where it is this near to a whole number of turns.
_NEAR = 0.25


@dataclass(frozen=True, kw_only=True)
class IdReader:
    """One place that turns ids into angles.

    Attributes:
        name: Operator and node, for messages.
        ids_name: The value that holds the ids, [B, S] in some shape; empty if it was not found.
        choice: With several position axes, where each frequency has taken the ids of one: the
            constant [F] that says which; else empty.
        tables: Values that hold cosines and sines, a row an id; empty where angles are computed.
        rows: Which of the fed tokens each token takes the angles of, by number; empty: its own.
    """

    name: str
    ids_name: str
    choice: str = ""
    tables: tuple[str, str] | tuple[()] = ()
    rows: str = ""

    @property
    def values(self) -> tuple[str, ...]:
        """All that :meth:`ids` has to be given."""
        return tuple(filter(None, (self.ids_name, self.choice, *self.tables, self.rows)))

    def ids(self, values: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Ids | str:
        """Which ids it sees, of that shape; or, in words, why there is no telling.

        Args:
            values: Those of :attr:`values`.
            shape: (B, S).
        """
        if not self.ids_name:
            return f"{self.name} does not read a product of ids and frequencies"
        found = values[self.ids_name].astype(np.float64)
        if found.size == shape[-1]:
            # Of a row that all rows share.
            found = np.broadcast_to(found.reshape(1, shape[-1]), shape)
        if len(shape) == 3 and self.choice and found.size != np.prod(shape):
            found = _by_axis(found, values[self.choice].ravel(), shape)
        if found.size != np.prod(shape):
            return f"{self.name} reads {list(found.shape)} ids instead of {list(shape)}"
        ids: Ids = found.reshape(shape)
        if self.rows:
            numbers = values[self.rows].ravel().astype(np.int64)
            fed = int(np.prod(shape[-2:]))
            if numbers.size != fed or numbers.min() < 0 or numbers.max() >= fed:
                return f"{self.name} takes {numbers.size} rows up to {numbers.max()} of {fed}"
            ids = ids.reshape(*shape[:-2], fed)[..., numbers].reshape(shape)
        if not self.tables:
            return ids
        cos, sin = (values[name] for name in self.tables)
        stands_for = _ids_of_rows(cos, sin)
        rows = ids.astype(np.int64)
        if rows.min() < 0 or rows.max() >= len(stands_for):
            return f"{self.name} reads row {rows.max()} of a table of {len(stands_for)}"
        return stands_for[rows]

    def wrong_choice(self, values: Mapping[str, NDArray[Any]], wanted: Sequence[int]) -> str:
        """Which frequency turns by an axis that it should not, in words; empty if none does.

        Args:
            values: Those of :attr:`values`.
            wanted: The axis of each frequency; empty where that is not known.
        """
        if not self.choice or not wanted:
            return ""
        seen = values[self.choice].ravel()
        if len(seen) != len(wanted):
            return f"{self.name} turns by {len(seen)} frequencies instead of {len(wanted)}"
        wrong = np.flatnonzero(seen != np.array(wanted))
        if not wrong.size:
            return ""
        first = wrong[0]
        return (
            f"{self.name} turns frequency {first} by axis {seen[first]} instead of "
            f"{wanted[first]} ({wrong.size} of {len(wanted)} frequencies are wrong)"
        )


def _by_axis(found: Ids, axes: NDArray[Any], shape: tuple[int, ...]) -> Ids:
    """Ids [F, B, S] or [B, S, F] of frequencies as those of axes, [A, B, S].

    Of frequencies of one axis that differ, the furthest off from the first is taken; an axis that
    turns no frequency has no ids. What does not fit comes back as it is.
    """
    num_axes, batch, length = shape
    if found.size != len(axes) * batch * length:
        return found
    last = found.ndim > 2 and found.shape[-1] == len(axes)
    each = found.reshape(batch, length, -1) if last else found.reshape(-1, batch * length).T
    each = each.reshape(batch, length, len(axes))
    seen = np.full(shape, np.nan)
    for axis in range(num_axes):
        of_axis = each[..., axes == axis]
        if of_axis.size:
            first = of_axis[..., :1]
            furthest = np.abs(of_axis - first).argmax(axis=-1)[..., None]
            seen[axis] = np.take_along_axis(of_axis, furthest, axis=-1)[..., 0]
    return seen


def _ids_of_rows(cos: NDArray[Any], sin: NDArray[Any]) -> Ids:
    """Which id each row [d / 2] of a table [R, d / 2] stands for.

    From one row to the next the fastest column turns by less than half a turn, so that its angle
    can be followed from row to row, and is its row's number times a step.
    """
    angles = np.unwrap(
        np.arctan2(sin.astype(np.float64), cos.astype(np.float64)), axis=0, period=2 * np.pi
    )
    numbers = np.arange(len(angles), dtype=np.float64)
    # Least squares: how the numbers were rounded to 16 bits is as often too much as too little.
    steps = numbers @ angles / max(float(numbers @ numbers), 1.0)
    fastest = int(np.argmax(np.abs(steps)))
    ids: Ids = angles[:, fastest] / (steps[fastest] or 1.0)
    whole = np.rint(ids)
    return np.where(np.abs(ids - whole) < _NEAR, whole, ids)
