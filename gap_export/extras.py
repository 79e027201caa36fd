"""The optional extras: what each brings, where to get it, and one message where one is missing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from urllib.parse import unquote, urlsplit

from gap_export.errors import MissingDependencyError
from gap_export.version import SOURCE

DISTRIBUTION = "gap-export"

# extra -> modules that must import for it to count as installed
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "export": ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"),
    "patch": ("onnx", "onnx_ir", "onnxscript"),
    "trt-rtx": ("tensorrt_rtx", "cuda.bindings"),
    "trt": ("tensorrt", "cuda.bindings"),
    "report": ("jinja2", "matplotlib"),
    # An address of ray://host:port is read by Ray's client, which needs grpc.
    "ray": ("ray", "grpc"),
    "refcoco": ("pyarrow",),
    "openvino": ("openvino",),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "httpx"),
    # Not ray.serve, which comes with ray; to look for it would import ray.
    "serve-ray": ("ray", "aiohttp", "mmh3", "smart_open", "watchfiles"),
    "bench": ("pynvml",),
    "stream": ("av",),
    "ros": ("rosbags",),
    "dora": ("dora", "pyarrow"),
    # Not "optimum": a folder of that name comes with gap-export itself, see its register stub.
    "optimum": ("optimum.commands.optimum_cli",),
}


def missing_modules(extra: str) -> list[str]:
    """Modules of an extra that are not installed; nothing is imported to find out."""
    return [name for name in EXTRAS[extra] if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        # The package a submodule would be in is not there either.
        return False


def require_extra(extra: str, purpose: str) -> None:
    """Refuse to go on without an extra.

    Args:
        extra: A key of EXTRAS.
        purpose: What needs it, e.g. "exporting a model".

    Raises:
        MissingDependencyError: a module of the extra is not installed.
    """
    missing = missing_modules(extra)
    if missing:
        raise MissingDependencyError(
            f"{purpose} needs packages that are not installed",
            seen=", ".join(missing),
            fix=f"install them with: {pip_install(extra)}",
        )


def pip_install(*extras: str) -> str:
    """A shell line that installs gap-export again, with extras, from where this one is from.

    Never by its name alone, see :data:`gap_export.version.SOURCE`.
    """
    return f"pip install {shlex.quote(_requirement(extras))}"


def _requirement(extras: tuple[str, ...]) -> str:
    brackets = f"[{','.join(extras)}]" if extras else ""
    try:
        # What pip noted of a source that is no index (PEP 610).
        origin = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        found = origin["vcs_info"]
        return f"{DISTRIBUTION}{brackets} @ {found['vcs']}+{url}@{found['commit_id']}"
    if url.startswith("file://"):
        return unquote(urlsplit(url).path) + brackets
    return f"{DISTRIBUTION}{brackets} @ {url}" if url else SOURCE + brackets
