"""Answers as they were given, independent of how they will be judged; in files, to go on from.

A file of records is JSON lines: first what was asked of what, then one answer a line. It is written
piece by piece, so whatever ends an evaluation, the answers before are there; a last piece that was
cut off is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from gap_export.errors import OutputError
from gap_export.parity.metrics import Box

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "gap-export-records"
FORMAT_VERSION = 2
SUFFIX = ".jsonl"
Fault = Literal["broken picture", "refused expression"]
_FAULTS: tuple[Fault, ...] = ("broken picture", "refused expression")
_MAX_COUNT = 2**31
# Links are not written through, and a pipe must not be waited for; Windows has neither.
_NO_LINK, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
# Far above any real line; a file of something else is not read to its end.
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answered question.

    Attributes:
        question_id: Of the question.
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
    """

    question_id: str
    text: str
    fractions: Box | None
    box: Box | None
    image_size: tuple[int, int]
    num_kept_tokens: int
    num_visual_tokens: int
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 1
    orientation: int = 1
    error: str | None = None
    fault: Fault | None = None
    cut_off: bool = False
    backend: str = ""


class RecordsFile:
    """The answers of one setting; a context manager.

    Attributes:
        path: The file.
        records: What it holds, by question.
    """

    def __init__(
        self, path: Path, header: Mapping[str, str], *, pieces: Iterable[Sequence[str]]
    ) -> None:
        """Open a file, or make it.

        Args:
            path: Of the file; its folder exists.
            header: What is asked of what. A file with another one is refused.
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

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        # On a full disk the last flush fails again, and has been told of.
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
        _check_header(self.path, _parse_header(self.path, first), header)
        found: list[tuple[int, Record]] = []
        while True:
            start = self._file.tell()
            line = self._file.readline(_MAX_LINE_BYTES)
            # The last line has no end where its writing was cut off.
            if not line.endswith(b"\n"):
                break
            found.append((start, self._parse_record(line, len(found) + 2)))
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

    def _parse_record(self, line: bytes, number: int) -> Record:
        try:
            plain = json.loads(line)
            record = _to_record(plain)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as err:
            raise OutputError(
                "a file of records is damaged",
                seen=f"{self.path}, line {number}: {err}",
                fix="delete it; its questions are then asked again",
            ) from err
        return record


def _to_record(plain: dict[str, Any]) -> Record:
    """A record from its JSON form.

    Raises:
        ValueError: a value is not what it should be.
        TypeError: likewise.
        KeyError: a value is missing.
        OverflowError: a number is beyond what a float holds.
    """
    for key in ("fractions", "box"):
        if plain[key] is not None:
            plain[key] = tuple(_finite(value) for value in plain[key])
            if len(plain[key]) != 4:
                raise ValueError(f"{key} has {len(plain[key])} numbers")
    timings = plain["timings_ms"]
    if not isinstance(timings, dict):
        raise TypeError("timings_ms are not an object")
    plain["timings_ms"] = {str(stage): _finite(value) for stage, value in timings.items()}
    texts = ("question_id", "text", "backend")
    if not all(isinstance(plain[key], str) for key in texts):
        raise ValueError(f"{', '.join(texts)} are not all text")
    if not isinstance(plain["error"], (str, type(None))):
        raise TypeError("error is no text")
    if plain.get("fault") not in (None, *_FAULTS):
        raise ValueError("no such fault")
    if not isinstance(plain["cut_off"], bool):
        raise TypeError("cut_off is neither true nor false")
    width, height = plain["image_size"]
    plain["image_size"] = (width, height)
    # Only of an image that was not read nobody knows the size.
    smallest = 1 if plain["error"] is None else 0
    for count in (width, height, plain["batch_size"]):
        _check_count(count, smallest)
    if plain.get("orientation", 1) not in range(1, 9):
        raise ValueError("no such orientation")
    for key in ("num_kept_tokens", "num_visual_tokens"):
        _check_count(plain[key], 0)
    return Record(**plain)


def _finite(value: object) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:20]} is no number")
    return float(value)


def _check_count(value: object, smallest: int) -> None:
    if not isinstance(value, int) or not smallest <= value < _MAX_COUNT:
        raise ValueError(f"{str(value)[:20]} is no number of pixels, tokens or questions")


def _line(plain: Mapping[str, object]) -> bytes:
    return json.dumps(plain, allow_nan=False).encode("ascii") + b"\n"


def _parse_header(path: Path, line: bytes) -> dict[str, object]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise _something_else(path)
    return found


def _something_else(path: Path) -> OutputError:
    return OutputError(
        "a file of records is to be where something else is",
        seen=path,
        fix="name another folder for the records",
    )


def _check_header(path: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Refuse answers to other questions.

    Raises:
        OutputError: what is asked now is not what was asked then.
    """
    differing = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if differing:
        raise OutputError(
            "the records are from another evaluation, and cannot be gone on with",
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
