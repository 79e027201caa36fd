"""The files a shard needs, and whether a node of a cluster has them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.evaluation.questions import ImageSource, Question
from gap_export.evaluation.workers import Shard
from gap_export.spec.manifest import MANIFEST_NAME

# Of a file: the SHA-256 it must have, None where it only has to be there.
NodeFiles = Mapping[Path, str | None]


def with_absolute_paths(shard: Shard) -> Shard:
    """The same shard for a process in another working folder."""
    setting = replace(shard.setting, bundle=shard.setting.bundle.absolute())
    questions = tuple(
        replace(question, image=_with_absolute_path(question.image)) for question in shard.questions
    )
    return replace(shard, setting=setting, questions=questions)


def _with_absolute_path(image: ImageSource) -> ImageSource:
    if image.path is not None:
        return replace(image, path=image.path.absolute())
    if image.parquet is not None:
        file, row = image.parquet
        return replace(image, parquet=(file.absolute(), row))
    return image


def files_of(shard: Shard) -> NodeFiles:
    """What this machine has of the files that a shard needs.

    An image that is missing here as well is none of the node's business: the shard is answered
    with that error, as it would be without a cluster.
    """
    manifest = shard.setting.bundle / MANIFEST_NAME
    found: dict[Path, str | None] = {}
    if manifest.is_file():
        # It lists the hashes of all other files, which opening the bundle looks at.
        found[manifest] = _hash(manifest)
    images = set(_images(shard.questions))
    found.update((path, None) for path in sorted(images) if path.is_file())
    return found


def _images(questions: tuple[Question, ...]) -> Iterator[Path]:
    for question in questions:
        if question.image.path is not None:
            yield question.image.path
        elif question.image.parquet is not None:
            yield question.image.parquet[0]


def check_files(files: NodeFiles, node: str) -> None:
    """Refuse to work on a node that has not got the files.

    Args:
        files: What the machine that asks has.
        node: Name of this node.

    Raises:
        UsageError: one is not here, or is another one.
    """
    for path, wanted in files.items():
        if not path.is_file():
            raise UsageError(
                f"the node {node} has not got a file that the evaluation needs",
                seen=path,
                fix="put bundles and images where all nodes see them under one path; bundles "
                "made on the way lie in the folder for temporary files (TMPDIR)",
            )
        if wanted is not None and _hash(path) != wanted:
            raise UsageError(
                f"the node {node} has another file under the same path",
                seen=path,
                fix="put the bundle where all nodes see the same one",
            )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
