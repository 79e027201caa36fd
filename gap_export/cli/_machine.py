"""What is on this machine: facts for ``doctor``, each of which may be missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, get_args

from gap_export.version import __version__

_DISTRIBUTION = "gap-export"
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SMI_FIELDS = ("name", "driver_version", "memory.total", "compute_cap")
# Jetson boards have no nvidia-smi worth asking, but say here what they are.
_BOARD_FILE = Path("/proc/device-tree/model")
# "# R36 (release), REVISION: 4.3, GCID: ...": what JetPack's version follows from.
_L4T_FILE = Path("/etc/nv_tegra_release")
_L4T = re.compile(r"# (R\d+) \(release\), REVISION: ([\d.]+)")
_MEMINFO = Path("/proc/meminfo")


def describe_machine() -> dict[str, Any]:
    """Everything ``doctor`` knows, as JSON data."""
    return {
        "gap_export": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "board": _board(),
            "l4t": _l4t(),
            "memory_bytes": _memory("SC_PHYS_PAGES"),
            "memory_free_bytes": _memory("SC_AVPHYS_PAGES"),
            "swap_bytes": _swap(),
            "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        },
        "packages": installed_packages(),
        "execution_providers": _execution_providers(),
        "torch_cuda": _torch_cuda(),
        "gpus": _gpus(),
        "tensorrt": _tensorrt(),
        "openvino": _openvino(),
    }


def installed_packages() -> dict[str, dict[str, str | None]]:
    """Version of each package of the base install and of each extra; None where it is missing.

    The list comes from this distribution's own metadata, so pyproject.toml is its only source.
    """
    found: dict[str, dict[str, str | None]] = {"base": {}}
    try:
        requirements = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        return found
    for requirement in requirements:
        specifier, _, marker = requirement.partition(";")
        name = _NAME.match(specifier.strip())
        extra = _EXTRA.search(marker)
        if name is None or name.group() == _DISTRIBUTION:
            continue
        group = extra.group(1) if extra else "base"
        packages = found.setdefault(group, {})
        packages[name.group()] = None
        with suppress(PackageNotFoundError):
            packages[name.group()] = version(name.group())
    return found


def _execution_providers() -> list[str]:
    try:
        from gap_export.runtime.backends.quiet_onnxruntime import ort
    except (ImportError, OSError):  # not installed, or a library that it links is missing
        return []
    return list(ort.get_available_providers())


def _torch_cuda() -> dict[str, Any] | None:
    """None where torch is not installed."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return {"available": torch.cuda.is_available(), "built_for": torch.version.cuda}


def _tensorrt() -> dict[str, Any]:
    """Which TensorRT packages import, and the engines of which targets can be built here."""
    from gap_export.engines.device import find_gpu
    from gap_export.engines.library import LibraryName, describe_versions, import_tensorrt
    from gap_export.engines.targets import TARGETS
    from gap_export.errors import MissingDependencyError

    libraries: dict[str, str | None] = {}
    releases = {}
    for name in get_args(LibraryName):
        try:
            library = import_tensorrt(name, purpose="building engines")
        except MissingDependencyError:
            libraries[name] = None
        else:
            libraries[name], releases[name] = library.version, library.release
    gpu = find_gpu()
    targets = {}
    for target in TARGETS.values():
        release = releases.get(target.library)
        generations = target.compute_capabilities
        on_its_gpu = gpu is not None and (not generations or gpu.compute_capability in generations)
        fits = release is not None and target.platform(release) is not None
        targets[target.name] = {
            "summary": target.summary,
            "builds_here": fits and (target.built_on == "any" or on_its_gpu),
            "needs": f"{target.library}: {describe_versions(target)}"
            + ("" if target.built_on == "any" else ", on the GPU the engines are for"),
        }
    return {"libraries": libraries, "targets": targets}


def _openvino() -> dict[str, Any]:
    """Its version and devices by OpenVINO's name; None and nothing where it is not installed."""
    from gap_export.errors import MissingDependencyError
    from gap_export.runtime.backends.openvino_loading import import_openvino, version

    try:
        openvino = import_openvino()
    except MissingDependencyError:
        return {"version": None, "devices": {}}
    core = openvino.Core()
    devices = {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}
    return {"version": version(openvino), "devices": devices}


def _gpus() -> list[dict[str, str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            query, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):  # there, but with no driver to talk to
        return []
    rows = [line.split(", ") for line in answer.stdout.splitlines() if line.strip()]
    return [dict(zip(_SMI_FIELDS, row, strict=False)) for row in rows]


def _board() -> str | None:
    try:
        return _BOARD_FILE.read_text(encoding="utf-8").strip("\0\n ")
    except (OSError, UnicodeDecodeError):
        return None


def _l4t() -> str | None:
    """Release of NVIDIA's Linux for Tegra, e.g. ``R36.4.3``; None where it is none."""
    try:
        found = _L4T.match(_L4T_FILE.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        return None
    return ".".join(found.groups()) if found else None


def _swap() -> int | None:
    try:
        found = re.search(r"^SwapTotal:\s+(\d+) kB", _MEMINFO.read_text(encoding="ascii"), re.M)
    except (OSError, UnicodeDecodeError):
        return None
    return int(found.group(1)) * 1024 if found else None


def _memory(pages: str) -> int | None:
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system answers
        return None
