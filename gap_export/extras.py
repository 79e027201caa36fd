"""The optional extras: what each brings, and one clear message where one is missing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from gap_export.errors import MissingDependencyError

# extra -> modules that must import for it to count as installed
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "export": ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "trtcheck"),
    "patch": ("onnx", "onnx_ir", "onnxscript"),
    "trt-rtx": ("tensorrt_rtx", "cuda.bindings"),
    "trt": ("tensorrt", "cuda.bindings"),
    "report": ("jinja2", "matplotlib"),
    # An address of ray://host:port is read by Ray's client, which needs grpc.
    "ray": ("ray", "grpc"),
    "refcoco": ("pyarrow",),
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
            fix=f'install them with: pip install "gap-export[{extra}]"',
        )
