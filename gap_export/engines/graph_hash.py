"""Which bytes an engine was built from: a graph's file, and the files its weights lie in."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

from gap_export.bundle import Bundle
from gap_export.errors import BundleError
from gap_export.graph.onnx_file import OnnxFile
from gap_export.spec.manifest import FileSpec, check_member_path


def hash_weights(bundle: Bundle, graph: str) -> str:
    """One hash for all weight files of a graph, from what the bundle's manifest says of them.

    SHA-256 over a line ``<sha256>  <path>`` for each file, in the order of their paths; no weight
    is read.

    Args:
        bundle: The bundle, opened and so checked.
        graph: An ONNX file of it.

    Raises:
        BundleError: not an ONNX file, or weights that leave the bundle or that it does not list.
    """
    folder, digest = PurePosixPath(graph).parent, hashlib.sha256()
    paths = {
        str(check_member_path(str(folder / constant.location)))
        for constant in OnnxFile.read(bundle.file(graph)).initializers.values()
        if constant.location is not None
    }
    for path in sorted(paths):
        digest.update(f"{listed_file(bundle, path).sha256}  {path}\n".encode())
    return digest.hexdigest()


def listed_file(bundle: Bundle, path: str) -> FileSpec:
    """What the manifest says of a file.

    Raises:
        BundleError: it does not list the file.
    """
    for file in bundle.manifest.files:
        if file.path == path:
            return file
    raise BundleError(
        "the bundle has no such file",
        seen=path,
        fix="export it again, or build its engines again",
    )
