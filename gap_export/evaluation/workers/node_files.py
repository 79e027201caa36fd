"""The files a shard needs, and whether a node of a cluster has them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.evaluation.workers import Shard
from gap_export.spec.manifest import MANIFEST_NAME

# The SHA-256 that a file must have, None where it only has to be there.
NodeFiles = Mapping[Path, str | None]


def files_of(shard: Shard) -> NodeFiles:
    """What this machine has of the files that a shard needs.

    An image that is missing here as well is not asked of the node: the shard is answered with that
    error, as it would be without a cluster.
    """
    manifest = shard.setting.bundle / MANIFEST_NAME
    found: dict[Path, str | None] = {}
    if manifest.is_file():
        # It lists the hashes of all other files, which opening the bundle looks at.
        found[manifest] = _hash(manifest)
    sources = [question.image for question in shard.questions]
    images = {source.path or (source.parquet and source.parquet[0]) for source in sources}
    found.update((path, None) for path in sorted(filter(None, images)) if path.is_file())
    return found


def check_files(files: NodeFiles, node: str) -> None:
    """Refuse to work on a node that lacks a file.

    Args:
        files: What the machine that asks has.
        node: Name of this node.

    Raises:
        UsageError: a file is missing, or is a different one.
    """
    for path, wanted in files.items():
        if not path.is_file():
            raise UsageError(
                f"the node {node} lacks a file that the evaluation needs",
                seen=path,
                fix="put bundles and images where all nodes see them under one path; bundles "
                "made on the way lie in the folder for temporary files (TMPDIR)",
            )
        if wanted is not None and _hash(path) != wanted:
            raise UsageError(
                f"the node {node} has a different file under the same path",
                seen=path,
                fix="put the bundle where all nodes see the same one",
            )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
