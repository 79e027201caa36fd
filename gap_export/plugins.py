"""What other packages add to this one, by entry points.

An entry point of a group has the thing's name, and its object is the thing. One that cannot be used
stops only those who ask for it, and is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Generic, TypeVar

from gap_export.errors import GapExportError

T = TypeVar("T")


class Plugins(Generic[T]):
    """Things of one kind that other packages bring.

    Args:
        group: The entry points' group.
        kind: What such a thing is called in messages, e.g. ``pruner``.
        check: Given the name, the object and how to call it in messages: the object, checked.
    """

    def __init__(self, *, group: str, kind: str, check: Callable[[str, object, str], T]) -> None:
        self.group = group
        self._kind, self._check = kind, check

    @cached_property
    def entries(self) -> Mapping[str, EntryPoint]:
        """Entry points by name; of two of one name the last, which is then refused."""
        return {entry.name: entry for entry in entry_points(group=self.group)}

    @cached_property
    def found(self) -> Mapping[str, T | GapExportError]:
        """All of them by name, or what is wrong with one; every package is imported."""
        found: dict[str, T | GapExportError] = {}
        for name in sorted(self.entries):
            try:
                found[name] = self.load(name)
            except GapExportError as err:
                found[name] = err
        return found

    def load(self, name: str) -> T:
        """One of :attr:`entries`; no other package is imported.

        Raises:
            GapExportError: several packages bring one of that name, it cannot be imported, or is
                not what it should be.
        """
        entry = self.entries[name]
        where = f"{self._kind} {name}, which {entry.value} should define,"
        found = entry_points(group=self.group, name=name)
        packages = sorted({entry.dist.name for entry in found if entry.dist is not None})
        if len(packages) > 1:
            raise GapExportError(
                f"{self._kind} {name} comes with several packages",
                seen=", ".join(packages),
                fix="uninstall all of them but one",
            )
        try:
            thing = entry.load()
        except (Exception, SystemExit) as err:  # anything may happen in another package's code
            raise GapExportError(
                f"{where} cannot be loaded",
                seen=f"{type(err).__name__}: {err}",
                fix=f"mend or uninstall the package that declares {self.group}",
            ) from err
        return self._check(name, thing, where)

    def package_of(self, name: str) -> str | None:
        """The package that one comes with, where that is known."""
        entry = self.entries.get(name)
        return entry.dist.name if entry is not None and entry.dist is not None else None

    def broken(self, ours: Collection[str]) -> Mapping[str, GapExportError]:
        """Those that cannot be used, and why; every package is imported.

        Args:
            ours: Names that gap-export has itself: another package's of such a name is never used.
        """
        unusable = {n: one for n, one in self.found.items() if isinstance(one, GapExportError)}
        hidden = {
            name: GapExportError(
                f"{self._kind} {name}, which {entry.value} should define, has a name that is taken",
                seen=name,
                allowed=f"any name but {', '.join(ours)}",
                fix=f"rename it, or uninstall {self.package_of(name) or 'its package'}",
            )
            for name, entry in self.entries.items()
            if name in ours
        }
        return MappingProxyType({**unusable, **hidden})

    def forget(self) -> None:
        """Look anew, where packages came or went in this process."""
        for name in ("entries", "found"):
            self.__dict__.pop(name, None)


def load_object(place: str, kind: type[T], *, what: str) -> T:
    """An object by its place.

    Args:
        place: ``module:NAME``.
        kind: What it must be.
        what: What it is called in messages.

    Raises:
        GapExportError: it cannot be imported, or is something else.
    """
    module, _, name = place.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as err:  # anything may happen in another package's code
        if isinstance(err, GapExportError) or module.startswith("gap_export."):
            raise
        raise GapExportError(
            f"{what} cannot be loaded from {place}",
            seen=f"{type(err).__name__}: {err}",
            fix="mend or uninstall the package that it comes with",
        ) from err
    if not isinstance(found, kind):
        raise GapExportError(
            f"{what}: {place} is not what it should be",
            seen=type(found).__name__,
            allowed=f"a {kind.__module__}.{kind.__name__}",
        )
    return found
