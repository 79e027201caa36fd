"""Opening a golden: nothing of it is used before all of it was checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.drafts import find_standing
from gap_export.bundle.files import sha256_of
from gap_export.bundle.tensors import read_place
from gap_export.errors import UsageError
from gap_export.parity.golden.format import (
    GOLDEN_NAME,
    HASH_NAME,
    LATER_INPUTS,
    METHODS,
    NAMES,
    OPTIONAL_INPUTS,
    RECORD_AGAIN,
    SAFETENSORS_DTYPES,
    SCALARS,
    TENSORS_NAME,
    GoldenSpec,
    StoredCall,
    StoredFacts,
    StoredTensor,
    hash_line,
    parse_golden,
)
from gap_export.parity.question import Question
from gap_export.parity.replay import Call
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.images.geometry import Box
from gap_export.spec.manifest import Manifest, QuantizationSpec, TensorPlace, differing_fields
from gap_export.version import __version__

# Far above any real one (a question takes some tens of kilobytes); keeps a hostile one from filling
# the memory.
_MAX_JSON_BYTES, _MAX_HASH_BYTES, _MAX_RANK = 256 << 20, 1 << 10, 16
_HEADER_LENGTH, _METADATA = struct.Struct("<Q"), "__metadata__"
_DECODER = "decoder_model_merged"


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What PyTorch gave for some questions; opened, and so checked.

    Attributes:
        path: Its folder, absolute.
        spec: What was recorded, of which model and with what.
        questions: What was asked; images as arrays.
        calls: What the reference's backend was asked and gave, by question; read from the disk each
            time they are asked for.
        answers: To each question.
    """

    path: Path
    spec: GoldenSpec
    questions: tuple[Question, ...]
    calls: Sequence[list[Call]]
    answers: tuple[Grounding, ...]

    @property
    def name(self) -> str:
        """What it is, for reports."""
        minute = self.spec.recorded[:16].replace("T", " ")
        return f"golden of {self.spec.reference}, recorded {minute} UTC"

    def check_dtype(self, dtype: str, quantization: QuantizationSpec | None) -> None:
        """Refuse a backend that does not compute in what the reference computed in.

        Raises:
            UsageError: it computes in another dtype, or with weights quantized otherwise.
        """
        spec = self.spec
        if (dtype, quantization) != (spec.dtype, spec.quantization):
            raise _other(
                "dtype",
                _dtype_words(spec.dtype, spec.quantization),
                f"{_dtype_words(dtype, quantization)}, in which this backend computes",
            )


def is_golden(path: str | Path) -> bool:
    """Whether a path is a golden's folder, be it whole or damaged."""
    folder = find_standing(Path(path).absolute())
    return any(os.path.lexists(folder / name) for name in NAMES)


def open_golden(folder: str | Path, manifest: Manifest) -> Golden:
    """Check a golden and read it.

    Raises:
        UsageError: no golden, a damaged or truncated one, of another version, or of another model,
            pruner or dtype than the bundle; the message names the field and both values.
    """
    path = find_standing(Path(folder).absolute())
    try:
        spec = parse_golden(_read_json_bytes(path))
        _check_identity(spec, manifest)
        _check_tensors(path, spec)
    except OSError as err:
        raise UsageError(
            "the golden cannot be read", seen=f"{path}: {err.strerror or err}", fix=RECORD_AGAIN
        ) from err
    _check_calls(spec)
    return Golden(
        path=path,
        spec=spec,
        questions=_read_questions(path, spec),
        calls=_Calls(path, spec),
        answers=spec.answers,
    )


def _read_json_bytes(path: Path) -> bytes:
    if not path.is_dir():
        raise UsageError("no golden there", seen=path, allowed=f"a folder with {GOLDEN_NAME}")
    for name, most in (
        (GOLDEN_NAME, _MAX_JSON_BYTES),
        (HASH_NAME, _MAX_HASH_BYTES),
        (TENSORS_NAME, None),
    ):
        if not os.path.lexists(path / name):
            raise _damaged(path, f"{name} is missing")
        status = os.lstat(path / name)
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, f"{name} is not a plain file")
        if most is not None and status.st_size > most:
            raise _damaged(path, f"{name} has {status.st_size} bytes, more than {most}")
    raw = (path / GOLDEN_NAME).read_bytes()
    if (path / HASH_NAME).read_bytes() != hash_line(raw):
        raise _damaged(path, f"{GOLDEN_NAME} does not match {HASH_NAME}")
    return raw


def _check_identity(spec: GoldenSpec, manifest: Manifest) -> None:
    """The golden is of what the bundle is."""
    recorded_by = spec.tools.get("gap-export", "unknown")
    if recorded_by != __version__:
        # What is pruned, and how an image is prepared, may change from one to the next.
        raise _other("version of gap-export", recorded_by, f"{__version__}, which runs now")
    for field, seen, allowed in (
        ("model", spec.model, manifest.model.name),
        ("family", spec.family, manifest.model.family),
        ("random_seed", str(spec.random_seed), str(manifest.source.random_seed)),
    ):
        if seen != allowed:
            raise _other(field, seen, f"{allowed}, the bundle's")
    _check_source(spec, manifest)
    here = {"pruning": manifest.pruning, **vars(StoredFacts.of(manifest))}
    for part, known in {"pruning": spec.pruning, **vars(spec.facts)}.items():
        for name, seen, allowed in differing_fields(known, here[part]):
            raise _other(f"{part}{name}", str(seen), f"{allowed}, the bundle's")
    forms = {(g.dtype, g.quantization) for g in manifest.graphs if g.component == _DECODER}
    if (spec.dtype, spec.quantization) not in forms:
        raise _other(
            "dtype",
            _dtype_words(spec.dtype, spec.quantization),
            f"{' or '.join(sorted(_dtype_words(*form) for form in forms))}, the bundle's",
        )


def _check_source(spec: GoldenSpec, manifest: Manifest) -> None:
    parts = manifest.source.parts
    seen, allowed = ([part.role for part in each] for each in (spec.source, parts))
    if set(seen) != set(allowed):
        raise _other("source", ", ".join(seen) or "none", ", ".join(allowed) or "none")
    one, other = (
        {f"{part.role}: {file.path}": file.sha256 for part in each for file in part.files}
        for each in (spec.source, parts)
    )
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise _other(
                f"source.{name}",
                f"SHA-256 {one.get(name, 'none')}",
                f"{other.get(name, 'none')}, the bundle's",
            )


def _check_tensors(path: Path, spec: GoldenSpec) -> None:
    """The file of arrays is the one that was written, and every array lies within it."""
    size = os.lstat(path / TENSORS_NAME).st_size
    if size != spec.tensors_size:
        raise _damaged(path, f"{TENSORS_NAME} has {size} bytes instead of {spec.tensors_size}")
    for name, tensor in spec.tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise _damaged(path, f"array {name} has dtype {tensor.dtype!r}")
        natural = min((tensor.offset, *tensor.shape)) >= 0 and len(tensor.shape) <= _MAX_RANK
        length = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        if not natural or tensor.offset + length > size:
            raise _damaged(path, f"array {name} lies outside of {TENSORS_NAME}")
    seen = sha256_of(path / TENSORS_NAME)
    if seen != spec.tensors_sha256:
        raise _damaged(path, f"{TENSORS_NAME} has SHA-256 {seen} instead of {spec.tensors_sha256}")
    if _read_layout(path / TENSORS_NAME) != dict(spec.tensors):
        raise _damaged(path, f"{GOLDEN_NAME} and {TENSORS_NAME} disagree on where arrays lie")


def _read_layout(file: Path) -> dict[str, StoredTensor]:
    """Arrays by name; none where the header cannot be read.

    Raises:
        OSError: it cannot be read.
    """
    names = {stored: name for name, stored in SAFETENSORS_DTYPES.items()}
    with file.open("rb") as stream:
        prefix = stream.read(_HEADER_LENGTH.size)
        length = _HEADER_LENGTH.unpack(prefix)[0] if len(prefix) == _HEADER_LENGTH.size else 0
        if length > file.stat().st_size:
            return {}
        raw = stream.read(length)
    start = _HEADER_LENGTH.size + length
    try:
        plain = json.loads(raw)
        return {
            name: StoredTensor(
                dtype=names[entry["dtype"]],
                shape=tuple(entry["shape"]),
                offset=start + entry["data_offsets"][0],
            )
            for name, entry in plain.items()
            if name != _METADATA
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _check_calls(spec: GoldenSpec) -> None:
    """Calls are such as a session makes, of arrays that are there."""
    if not len(spec.questions) == len(spec.calls) == len(spec.answers):
        raise UsageError(
            f"{GOLDEN_NAME} does not hold together",
            seen=f"{len(spec.questions)} questions, calls of {len(spec.calls)}, "
            f"{len(spec.answers)} answers",
            fix=RECORD_AGAIN,
        )
    for question in spec.questions:
        for what, name, form, allowed in (
            ("an image", question.image, ("uint8", (None, None, 3)), "uint8 [H, W, 3]"),
            ("a box", question.box, ("float64", (4,)), "float64 [4]"),
        ):
            if name is not None and not _is_of(spec.tensors.get(name), *form):
                raise UsageError(
                    f"{GOLDEN_NAME}: not {what}",
                    seen=f"{name!r} for {question.expression!r}",
                    allowed=allowed,
                    fix=RECORD_AGAIN,
                )
    for index, calls in enumerate(spec.calls):
        for call in calls:
            problem = _call_problem(spec, call)
            if problem:
                raise UsageError(
                    f"{GOLDEN_NAME}: a call that no session makes",
                    seen=f"{problem}, question {index + 1}",
                    fix=RECORD_AGAIN,
                )


def _is_of(tensor: StoredTensor | None, dtype: str, shape: tuple[int | None, ...]) -> bool:
    """Whether an array is there and of this form; None stands for any size."""
    if tensor is None or tensor.dtype != dtype or len(tensor.shape) != len(shape):
        return False
    return all(wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True))


def _call_problem(spec: GoldenSpec, call: StoredCall) -> str:
    """What is wrong with a call; empty for nothing."""
    method = METHODS.get(call.method)
    if method is None:
        return repr(call.method)
    outputs, inputs = call.outputs.keys(), set(method.inputs)
    if (
        not inputs - LATER_INPUTS <= call.inputs.keys() <= inputs
        or not method.outputs <= outputs <= method.outputs | method.optional
    ):
        return f"{call.method} of {sorted(call.inputs)} that gave {sorted(outputs)}"
    for name, key in (*call.inputs.items(), *call.outputs.items()):
        if key is None:
            if name not in OPTIONAL_INPUTS:
                return f"{call.method} without {name}"
            continue
        tensor = spec.tensors.get(key)
        if tensor is None:
            return f"{name} of {call.method} is {key!r}, which is not in the golden"
        if name in SCALARS and not _is_of(tensor, "int64", ()):
            return f"{name} of {call.method} is not one integer"
    if call.margins is not None and not _is_of(spec.tensors.get(call.margins), "float32", (None,)):
        return f"margins of {call.method} are {call.margins!r}, which is no row of float32"
    return ""


class _Calls(Sequence[list[Call]]):
    """Calls of each question, read when they are asked for: together they may be gigabytes."""

    def __init__(self, path: Path, spec: GoldenSpec) -> None:
        self._path = path
        self._spec = spec

    def __len__(self) -> int:
        return len(self._spec.calls)

    @overload
    def __getitem__(self, index: int) -> list[Call]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Call]]: ...

    def __getitem__(self, index: int | slice) -> list[Call] | list[list[Call]]:
        if isinstance(index, slice):
            return [self._read(stored) for stored in self._spec.calls[index]]
        return self._read(self._spec.calls[index])

    def _read(self, calls: Sequence[StoredCall]) -> list[Call]:
        def read(key: str) -> NDArray[Any]:
            return _read_array(self._path, self._spec.tensors[key])

        def fed(name: str, key: str) -> NDArray[Any]:
            return read(key).reshape(1) if name in SCALARS else read(key)

        return [
            Call(
                component=METHODS[call.method].component,
                inputs={n: fed(n, key) for n, key in call.inputs.items() if key is not None},
                outputs={name: read(key) for name, key in call.outputs.items()},
                margins=None if call.margins is None else read(call.margins),
            )
            for call in calls
        ]


def _read_questions(path: Path, spec: GoldenSpec) -> tuple[Question, ...]:
    images: dict[str, NDArray[np.uint8]] = {}
    questions = []
    for stored in spec.questions:
        if stored.image not in images:
            images[stored.image] = _read_array(path, spec.tensors[stored.image])
            seen = hashlib.sha256(images[stored.image].tobytes()).hexdigest()
            if seen != stored.image_sha256:
                raise _damaged(path, f"the image {stored.image} has SHA-256 {seen}")
        box: Box | None = None
        if stored.box is not None:
            x1, y1, x2, y2 = map(float, _read_array(path, spec.tensors[stored.box]))
            box = (x1, y1, x2, y2)
        questions.append(
            Question(image=images[stored.image], expression=stored.expression, box=box)
        )
    return tuple(questions)


def _read_array(path: Path, tensor: StoredTensor) -> NDArray[Any]:
    place = TensorPlace(
        file=TENSORS_NAME, offset=tensor.offset, dtype=tensor.dtype, shape=tensor.shape
    )
    return read_place(path, place)


def _dtype_words(dtype: str, quantization: QuantizationSpec | None) -> str:
    if quantization is None:
        return dtype
    head = " with the LM head" if quantization.lm_head else ""
    method = f"{quantization.method} in blocks of {quantization.block_size}{head}"
    return f"{dtype} with {quantization.dtype} weights ({method})"


def _other(field: str, seen: object, allowed: str) -> UsageError:
    return UsageError(
        f"the golden was recorded with another {field}",
        seen=seen,
        allowed=allowed,
        fix=f"name the golden of this bundle, or {RECORD_AGAIN}",
    )


def _damaged(path: Path, seen: str) -> UsageError:
    return UsageError(
        "the golden is damaged or not complete",
        seen=f"{path}: {seen}",
        fix=f"copy it again from where it was made, or {RECORD_AGAIN}",
    )
