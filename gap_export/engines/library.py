"""The two TensorRT packages: imported when an engine is built or run, and no earlier."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from gap_export.engines.targets import (
    TARGETS,
    Platform,
    Target,
    TargetChoice,
    Version,
    parse_targets,
)
from gap_export.errors import MissingDependencyError, UsageError
from gap_export.extras import pip_install

LibraryName = Literal["tensorrt", "tensorrt_rtx"]


# The extra of gap-export that installs each.
_EXTRAS: Mapping[LibraryName, str] = MappingProxyType(
    {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
)


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """A TensorRT package that was imported.

    The version is the full one, e.g. ``10.3.0`` or ``1.7.1.116``.
    """

    name: LibraryName
    module: Any
    version: str

    @property
    def release(self) -> Version:
        """(major, minor)."""
        numbers = re.findall(r"\d+", self.version)
        return int(numbers[0]), int(numbers[1])

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX.

        That builds for a GPU generation that is chosen, the other one for the GPU at hand; and it
        measures nothing while building, so that there is no timing cache to keep.
        """
        return self.name == "tensorrt_rtx"


def import_tensorrt(
    name: LibraryName, *, purpose: str, allowed: str | None = None, otherwise: str | None = None
) -> TensorRT:
    """Import a TensorRT package.

    Args:
        name: The package.
        purpose: What needs it, e.g. ``running engines``.
        allowed: The versions that will do, for the message.
        otherwise: What to do where it is missing; None: install it.

    Raises:
        MissingDependencyError: not installed, or its libraries cannot be loaded.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name != name:
            raise _not_loadable(name, purpose, err) from err
        install = f"install it with: {pip_install(_EXTRAS[name])}"
        raise MissingDependencyError(
            f"{purpose} needs a package that is not installed",
            seen=name,
            allowed=allowed,
            fix=otherwise or install,
        ) from err
    except (ImportError, OSError, RuntimeError) as err:
        # The package is there, the vendor's shared libraries or the driver are not.
        raise _not_loadable(name, purpose, err) from err
    version = getattr(module, "__version__", None)
    if not isinstance(version, str) or len(re.findall(r"\d+", version)) < 2:
        raise MissingDependencyError(
            f"{purpose} needs a package that is installed but not whole",
            seen=f"{name} without a version",
            fix=_reinstall(name),
        )
    return TensorRT(name=name, module=module, version=version)


def library_for(target: Target) -> TensorRT:
    """The TensorRT that builds a target's engines, of a version the target has.

    Raises:
        MissingDependencyError: not installed, not loadable, or of a version that none of the
            target's platforms has.
    """
    library = import_tensorrt(
        target.library,
        purpose=f"building engines of target {target.name}",
        allowed=describe_versions(target),
        # A board's software brings its own; what could be installed here builds nothing for it.
        otherwise=elsewhere(target) if target.compute_capabilities else None,
    )
    if target.platform(library.release) is None:
        raise MissingDependencyError(
            f"target {target.name} is not built by this version of {library.name}",
            seen=library.version,
            allowed=describe_versions(target),
            fix=elsewhere(target) or f"install a version of {library.name} that fits",
        )
    return library


def target_for(compute_capability: int) -> TargetChoice:
    """The target whose engines can be built on this machine and run on a GPU of that generation.

    Args:
        compute_capability: SM number of the GPU at hand, e.g. 89.

    Raises:
        UsageError: there is none; ``seen`` says of every target why.
    """
    refusals = []
    # A board's own target before that of any GPU.
    for row in sorted(TARGETS.values(), key=lambda one: not one.compute_capabilities):
        known = compute_capability in row.compute_capabilities
        if row.compute_capabilities and not known:
            refusals.append(f"{row.name} has no SM {compute_capability}")
            continue
        try:
            library_for(row)
        except MissingDependencyError as err:
            refusals.append(f"{row.name}: {err.what}: {err.seen}")
            continue
        (choice,) = parse_targets([f"{row.name}:sm{compute_capability}" if known else row.name])
        return choice
    raise UsageError("nothing here builds engines for this GPU", seen="; ".join(refusals))


def describe_versions(target: Target) -> str:
    """Which TensorRT a target takes, e.g. ``10.3 (JetPack 6.2), 10.16 to 11.4 (JetPack 7.2)``."""
    return ", ".join(_describe_platform(platform) for platform in target.platforms)


def _describe_platform(platform: Platform) -> str:
    low, high = (f"{v[0]}.{v[1]}" for v in (platform.min_version, platform.max_version))
    span = low if low == high else f"{low} to {high}"
    # Some releases are called by their numbers.
    return platform.name if span in platform.name else f"{span} ({platform.name})"


def elsewhere(target: Target) -> str | None:
    """Where else the engines are built; None where any machine will do."""
    if target.built_on == "any":
        return None
    place = target.summary if target.compute_capabilities else "the machine that has the GPU"
    return (
        f"copy the bundle to {place} and run there: "
        f"python3 -m gap_export.engines build BUNDLE --target {target.name}"
    )


def installed_targets() -> tuple[str, ...]:
    """Names of the targets whose TensorRT can be imported here, in a version that fits."""
    names = []
    for target in TARGETS.values():
        try:
            library_for(target)
        except MissingDependencyError:
            continue
        names.append(target.name)
    return tuple(names)


def _not_loadable(name: LibraryName, purpose: str, err: Exception) -> MissingDependencyError:
    return MissingDependencyError(
        f"{purpose} needs {name}, which is installed but cannot be loaded",
        seen=err,
        fix=_reinstall(name),
    )


def _reinstall(name: LibraryName) -> str:
    line = pip_install(_EXTRAS[name])
    return f"install it again: {line.replace('install', 'install --force-reinstall', 1)}"
