"""Answers as they were given, before they are judged, in files from which work can be resumed.

A file of records is JSON lines: first what was asked of what, then one answer a line. It is written
piece by piece: however an evaluation ends, the answers before it are there; a last piece that was
cut off is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import ConfigDict, Field, InstanceOf, TypeAdapter, with_config

from gap_export.errors import OutputError

FORMAT = "gap-export-records"
FORMAT_VERSION = 3
SUFFIX = ".jsonl"
Fault = Literal["broken picture", "refused expression"]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Box = tuple[_Number, _Number, _Number, _Number]
# Answers may hold half characters (surrogates), which are no text to pydantic.
_Text = InstanceOf[str]
# Links are not written through, and a pipe must not be waited for; Windows has neither.
_NO_LINK, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
# Far above any real line; a file of something else is not read to its end.
_MAX_LINE_BYTES = 1 << 20


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Record:
    """One answered question.

    Attributes:
        text: The model's answer.
        fractions: The box as the model gave it, divided by its scale; corners in the order given,
            not clipped. None where nothing was parsed.
        box: In pixels of the image, corners in order, clipped; None where the answer holds no box
            or one without area in the image.
        image_size: Width and height of the image as loaded; (0, 0) with an error.
        orientation: EXIF orientation that the image carries, 1..8.
        num_kept_tokens: Visual tokens the decoder read, an extra one included.
        num_visual_tokens: Those there were.
        timings_ms: Milliseconds by stage, of the whole batch.
        batch_size: Questions asked together.
        error: Why it could not be asked: the image cannot be read, or the model refuses the
            expression. Then the text is empty and there is no box.
        fault: Which of the two, with an error.
        cut_off: Whether the answer was cut off at the model's ``max_new_tokens``.
        backend: What ran the model, with its version and device; empty with an error.
        score: ``Grounding.score``; None where there is no box.
    """

    question_id: _Text
    text: _Text
    fractions: _Box | None
    box: _Box | None
    image_size: tuple[_Count, _Count]
    num_kept_tokens: _Count
    num_visual_tokens: _Count
    timings_ms: Mapping[_Text, _Number] = field(default_factory=dict)
    batch_size: _Count = 1
    orientation: Annotated[int, Field(strict=True, ge=1, le=8)] = 1
    error: _Text | None = None
    fault: Fault | None = None
    cut_off: Annotated[bool, Field(strict=True)] = False
    backend: _Text = ""
    score: _Number | None = None


_READER = TypeAdapter(Record)
# Earlier versions did not write these.
_ALWAYS = {one.name for one in fields(Record)} - {"orientation", "fault"}


class RecordsFile(AbstractContextManager["RecordsFile"]):
    """The answers of one setting; a context manager.

    Attributes:
        path: The file.
        records: What it holds, by question.
    """

    def __init__(
        self, path: Path, header: Mapping[str, str], *, pieces: Iterable[Sequence[str]]
    ) -> None:
        """Open a file, or make it in a folder that exists.

        Args:
            path: The file.
            header: All that the answers depend on. A file with another one is refused.
            pieces: The questions as they are answered, one piece at a time; answers of a piece that
                is not complete do not count.

        Raises:
            OutputError: it cannot be read or written, is damaged or something else, its answers are
                to other questions or another model's, or another process writes to it.
        """
        self.path = path
        self.records: dict[str, Record] = {}
        self._pieces = [tuple(piece) for piece in pieces]
        try:
            # Not "a": what was cut off is written over.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK | _NO_WAIT, 0o666)
        except OSError as err:
            raise _unusable(path, err) from err
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise _something_else(path)
        self._file: BinaryIO = os.fdopen(handle, "r+b")
        try:
            _lock(self._file, path)
            self._read({"format": FORMAT, "format_version": FORMAT_VERSION, **header})
        except OSError as err:
            self._file.close()
            raise _unusable(path, err) from err
        except OutputError:
            self._file.close()
            raise

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        # On a full disk the last flush fails again, and has been reported.
        with suppress(OSError):
            self._file.close()

    def add(self, records: Sequence[Record]) -> None:
        """Append the answers of one piece.

        Raises:
            OutputError: they cannot be written.
        """
        try:
            self._file.write(b"".join(_line(asdict(record)) for record in records))
            self._file.flush()
        except OSError as err:
            raise _unusable(self.path, err) from err
        self.records.update({record.question_id: record for record in records})

    def _read(self, header: dict[str, object]) -> None:
        """Take what is there, and leave the file's position behind it."""
        first = self._file.readline(_MAX_LINE_BYTES)
        # A header alone that was cut off is written again.
        if not first or (not first.endswith(b"\n") and _line(header).startswith(first)):
            self._file.seek(0)
            self._file.truncate()
            self._file.write(_line(header))
            self._file.flush()
            return
        _check_header(self.path, first, header)
        found: list[tuple[int, Record]] = []
        while True:
            start = self._file.tell()
            line = self._file.readline(_MAX_LINE_BYTES)
            # The last line has no end where its writing was cut off.
            if not line.endswith(b"\n"):
                break
            found.append((start, _parse_record(line, f"{self.path}, line {len(found) + 2}")))
        # An image that could not be read may have been mended since; what is asked again is added
        # at the end, and of two answers the later one counts.
        have = {record.question_id for _, record in found if record.fault != "broken picture"}
        complete = {one for piece in self._pieces if have.issuperset(piece) for one in piece}
        while found and found[-1][1].question_id not in complete:
            start = found.pop()[0]
        self._file.seek(start)
        self._file.truncate()
        self.records = {
            record.question_id: record for _, record in found if record.question_id in complete
        }


def _parse_record(line: bytes, where: str) -> Record:
    try:
        plain = json.loads(line)
        record = _READER.validate_python(plain)
        missing = sorted(_ALWAYS - plain.keys())
        problem = f"without {', '.join(missing)}" if missing else ""
        # The size of an image is unknown only where the image was not read.
        if record.error is None and min(*record.image_size, record.batch_size) < 1:
            problem = "an answer about an image without pixels"
    except (ValueError, RecursionError) as err:
        problem = " ".join(str(err).split())[:200]
    if problem:
        raise OutputError(
            "a file of records is damaged",
            seen=f"{where}: {problem}",
            fix="delete it; its questions are then asked again",
        )
    return record


def _line(plain: Mapping[str, object]) -> bytes:
    return json.dumps(plain, allow_nan=False).encode("ascii") + b"\n"


def _something_else(path: Path) -> OutputError:
    return OutputError(
        "there is something else where a file of records should be",
        seen=path,
        fix="name another folder for the records",
    )


def _check_header(path: Path, line: bytes, wanted: Mapping[str, object]) -> None:
    """Refuse answers to other questions.

    Raises:
        OutputError: what is asked now is not what was asked then, or the file is something else.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise _something_else(path)
    differing = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if differing:
        raise OutputError(
            "the records are from another evaluation, which cannot be resumed as this one",
            seen=f"{path} has "
            + "; ".join(
                f"{key} {_short(found.get(key))}, asked is {_short(wanted.get(key))}"
                for key in differing
            ),
            fix="name another folder for the records, or ask what was asked then",
        )


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes out as long as the file is open.

    Raises:
        OutputError: another one is in.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has none; there two evaluations with the same records are the user's to avoid.
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise OutputError(
            "another evaluation is writing these records",
            seen=path,
            fix="wait for it, or name another folder for the records",
        ) from err


def _unusable(path: Path, err: OSError) -> OutputError:
    return OutputError(
        "a file of records cannot be read or written",
        seen=f"{path}: {err.strerror or err}",
        fix="make room, or name another folder for the records",
    )
