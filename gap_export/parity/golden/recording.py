"""Writing a golden: in a hidden sibling folder, renamed when complete."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.drafts import make_draft_folder, put_in_place, sweep_drafts, sync_tree
from gap_export.bundle.files import sha256_of
from gap_export.errors import OutputError, UsageError
from gap_export.outputs import check_outside_listings
from gap_export.parity.golden.format import (
    GOLDEN_NAME,
    HASH_NAME,
    LATER_INPUTS,
    METHODS,
    NAMES,
    SAFETENSORS_DTYPES,
    SCALARS,
    TENSORS_NAME,
    GoldenSpec,
    StoredCall,
    StoredFacts,
    StoredPart,
    StoredQuestion,
    StoredTensor,
    hash_line,
    method_of,
    without_scores,
)
from gap_export.parity.question import Question
from gap_export.parity.replay import Call
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.images.image import load_image
from gap_export.spec.manifest import Manifest, QuantizationSpec
from gap_export.version import __version__

# What a result may depend on.
_TOOLS = ("numpy", "torch", "transformers", "pillow", "tokenizers")
# A hub's cache keeps each commit's files in a folder of its name.
_SNAPSHOT = re.compile(r"(?:^|/)snapshots/([0-9a-f]{40})(?:/|$)")


@dataclass(frozen=True, kw_only=True)
class ReferenceFacts:
    """What is to be known of a reference."""

    name: str
    dtype: str
    quantization: QuantizationSpec | None


def record_golden(
    folder: str | Path,
    *,
    manifest: Manifest,
    reference: ReferenceFacts,
    questions: Sequence[Question],
    calls: Sequence[Sequence[Call]],
    answers: Sequence[Grounding],
    seed: int,
    force: bool = False,
) -> Path:
    """Keep everything PyTorch gave for some questions.

    Arrays that occur more than once, such as the image of several expressions, are written once.

    Args:
        folder: The golden's folder; its parent exists.
        manifest: Describes the bundle.
        reference: What was asked.
        questions: At least one.
        calls: Calls by question.
        answers: To each question.
        seed: Seed of the samples.
        force: Replace a golden that is there. Any other folder is refused in any case.

    Returns:
        The folder, absolute.

    Raises:
        ImageError: an image cannot be read.
        OutputError: the folder is taken, or cannot be written.
        UsageError: no questions.
    """
    if not questions:
        raise UsageError("nothing to record", seen="0 questions", allowed="at least 1")
    final = Path(folder).absolute()
    check_golden_place(final, force=force)
    arrays = _Arrays()
    asked = tuple(_store_question(arrays, question, manifest) for question in questions)
    called = tuple(tuple(_store_call(arrays, call) for call in each) for each in calls)
    assert len(asked) == len(called) == len(answers), "calls and an answer for each question"
    with _draft(final) as draft:
        tensors = arrays.write(draft / TENSORS_NAME)
        spec = GoldenSpec(
            recorded=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            reference=reference.name,
            tools=_tools(),
            seed=seed,
            model=manifest.model.name,
            family=manifest.model.family,
            source=tuple(
                StoredPart(
                    role=part.role,
                    commit=match[1] if (match := _SNAPSHOT.search(part.location)) else None,
                    files=part.files,
                )
                for part in manifest.source.parts
            ),
            random_seed=manifest.source.random_seed,
            dtype=reference.dtype,
            quantization=reference.quantization,
            pruning=manifest.pruning,
            facts=StoredFacts.of(manifest),
            tensors_size=(draft / TENSORS_NAME).stat().st_size,
            tensors_sha256=sha256_of(draft / TENSORS_NAME),
            tensors=tensors,
            questions=asked,
            calls=called,
            answers=tuple(without_scores(answer) for answer in answers),
        )
        raw = spec.to_json()
        (draft / GOLDEN_NAME).write_bytes(raw)
        (draft / HASH_NAME).write_bytes(hash_line(raw))
        sync_tree(draft, leave_out=())
        # Something may have been put there meanwhile.
        check_golden_place(final, force=force)
        put_in_place(draft, final)
    return final


def check_golden_place(folder: str | Path, *, force: bool) -> None:
    """Refuse a place for a golden, before the work.

    Raises:
        OutputError: its parent is no folder or cannot be written; or there is something already.
    """
    final = Path(folder).absolute()
    check_outside_listings("the golden", final, inside=final.parent)
    if not final.parent.is_dir():
        raise OutputError(
            "the folder that the golden is to be in does not exist",
            seen=final.parent,
            fix="create it, or choose another place",
        )
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise OutputError("nothing can be written there", seen=final.parent)
    if not os.path.lexists(final):
        return
    if final.is_symlink() or not final.is_dir():
        raise OutputError("the golden's place is taken: not a folder", seen=final)
    names = {path.name for path in final.iterdir()}
    if not names:
        return
    if GOLDEN_NAME not in names or not names <= NAMES:
        raise OutputError(
            "the golden's folder exists and holds something else",
            seen=f"{final} ({min(names - NAMES, default=f'no {GOLDEN_NAME}')})",
            allowed="a new or an empty folder",
            fix="choose another place; --force replaces goldens only",
        )
    if not force:
        raise OutputError(
            "the folder holds a golden already",
            seen=final,
            allowed="a new or an empty folder",
            fix="choose another place, or replace the golden with --force",
        )


class _Arrays:
    """Arrays by name, each distinct one once."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._arrays: dict[str, NDArray[Any]] = {}

    def add(self, array: NDArray[Any]) -> str:
        """Take an array; its name in the golden."""
        array = np.asarray(array)
        # Little-endian, as the file is.
        array = np.require(array, array.dtype.newbyteorder("<"), "C")
        assert array.dtype.name in SAFETENSORS_DTYPES, array.dtype
        digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
        digest.update(_bytes_of(array))
        name = self._names.setdefault(digest.hexdigest(), f"array_{len(self._names)}")
        self._arrays.setdefault(name, array)
        return name

    def write(self, path: Path) -> dict[str, StoredTensor]:
        """Write all into a new safetensors file.

        Raises:
            OSError: it cannot be written.
        """
        # Not at the top: it imports torch, which reading a golden must not.
        from gap_export.checkpoint.weights.placing import lay_out, new_file

        header, placed = lay_out(
            path.name,
            {n: (SAFETENSORS_DTYPES[a.dtype.name], a.shape) for n, a in self._arrays.items()},
        )
        with new_file(path, header, placed.values()) as stream:
            for name, array in self._arrays.items():
                assert stream.tell() == placed[name].offset, name
                stream.write(_bytes_of(array))
        return {
            name: StoredTensor(
                dtype=array.dtype.name, shape=array.shape, offset=placed[name].offset
            )
            for name, array in self._arrays.items()
        }


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _store_question(arrays: _Arrays, question: Question, manifest: Manifest) -> StoredQuestion:
    # As displayed: loading it once more changes nothing.
    pixels = np.asarray(load_image(question.image, pad_color=manifest.image.pad_color))
    return StoredQuestion(
        image=arrays.add(pixels),
        image_sha256=hashlib.sha256(_bytes_of(pixels)).hexdigest(),
        expression=question.expression,
        # Not as text: what is hit is judged by it, and only arrays are vouched for twice.
        box=None if question.box is None else arrays.add(np.asarray(question.box, np.float64)),
    )


def _store_call(arrays: _Arrays, call: Call) -> StoredCall:
    method = method_of(call)
    inputs: dict[str, str | None] = {}
    for name in METHODS[method].inputs:
        value = call.inputs.get(name)
        if value is None and name in LATER_INPUTS:
            continue
        if value is not None and name in SCALARS:
            value = value.reshape(())
        inputs[name] = None if value is None else arrays.add(value)
    return StoredCall(
        method=method,
        inputs=inputs,
        outputs={name: arrays.add(array) for name, array in call.outputs.items()},
        margins=None if call.margins is None else arrays.add(call.margins),
    )


def _tools() -> dict[str, str]:
    versions = {"gap-export": __version__, "python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            # Then it took no part.
            continue
    return versions


@contextmanager
def _draft(final: Path) -> Iterator[Path]:
    """A folder that is to become the golden; gone afterwards where it did not."""
    draft, lock = None, -1
    try:
        sweep_drafts(final)
        draft, lock = make_draft_folder(final)
        yield draft
    except OSError as err:
        raise OutputError(
            "the golden cannot be written",
            seen=f"{final}: {err.strerror or err}",
            fix="make room or choose another place; nothing half-written was left",
        ) from err
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if lock >= 0:
            os.close(lock)
