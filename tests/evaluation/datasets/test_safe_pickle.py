from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.datasets import safe_pickle
from gap_export.evaluation.datasets.safe_pickle import read_plain_pickle
from tests.evaluation.datasets.builders import REFS, python2_pickle


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> object:
        return os.system, (self.command,)


def written(folder: Path, raw: bytes) -> Path:
    file = folder / "refs(unc).p"
    file.write_bytes(raw)
    return file


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    plain = [{"a": [1, 2.5, None, True, "ü"], "b": (b"x", {3}, 2**80)}, *REFS]
    # Sets and byte strings are calls of a function before protocol 3 and 4.
    if protocol < 4:
        plain[0] = {"a": [1, 2.5, None, True, "ü"]}
    assert read_plain_pickle(written(tmp_path, pickle.dumps(plain, protocol))) == plain


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2_text_is_text(tmp_path: Path, protocol: int) -> None:
    plain = [*REFS, {"sent": "crème"}]
    assert read_plain_pickle(written(tmp_path, python2_pickle(plain, protocol))) == plain


def test_python_2_text_that_is_no_utf8_is_marked(tmp_path: Path) -> None:
    assert read_plain_pickle(written(tmp_path, b"\x80\x02U\x03a\xe9b.")) == "a�b"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_not_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "run"
    raw = pickle.dumps([Evil(f"touch {mark}")], protocol)
    with pytest.raises(UsageError, match=r"would execute code: .*asks for (posix|nt)\.system"):
        read_plain_pickle(written(tmp_path, raw))
    assert not mark.exists()
    # The same bytes do run where nobody looks.
    pickle.loads(raw)
    assert mark.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"ccollections\nOrderedDict\n)R.",
        b"Psomewhere\n.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",
    ],
)
def test_anything_but_data_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(UsageError, match="would execute code"):
        read_plain_pickle(written(tmp_path, raw))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b".",
        b"not a pickle",
        b"\x80\x63.",
        b"I12x\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
        # An extension that nobody has registered; a state for what has none; no such memo.
        b"\x80\x02\x82\x01.",
        b"]}b.",
        b"g7\n.",
        b"}]Nsas.",
    ],
)
def test_damaged_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(UsageError, match="not a pickle that can be read"):
        read_plain_pickle(written(tmp_path, raw))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cut_off_anywhere_is_refused(tmp_path: Path, protocol: int) -> None:
    raw = pickle.dumps(REFS[:1], protocol)
    for length in range(0, len(raw) - 1, 3):
        with pytest.raises(UsageError):
            read_plain_pickle(written(tmp_path, raw[:length]))


def test_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_pickle, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(UsageError, match="too large"):
        read_plain_pickle(written(tmp_path, pickle.dumps(REFS)))
