"""Hashing in the background: right, once, and never a reason to wait for the end."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time

import pytest

from gap_export.bundle import hashing
from gap_export.bundle.hashing import FileHasher
from gap_export.errors import CheckpointError, OutputError
from tests.programs import start_program


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000])
def test_hash_is_hashlibs(tmp_path, monkeypatch, size):
    monkeypatch.setattr(hashing, "_CHUNK_BYTES", 1000)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    with FileHasher() as hasher:
        assert hasher.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
        assert hasher.hashed(tmp_path / "file").state.size == size


def test_links_to_one_file_are_one_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with FileHasher() as hasher:
        assert not hasher.has(tmp_path / "link")
        hasher.start(tmp_path / "file")
        assert hasher.has(tmp_path / "link")


def test_file_that_cannot_be_read_is_told_when_asked_for(tmp_path):
    with FileHasher() as hasher:
        hasher.start(tmp_path / "none")
        with pytest.raises(CheckpointError, match=r"cannot be read: .*none: No such file"):
            hasher.sha256(tmp_path / "none")


def test_file_written_to_while_it_is_hashed_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"first")

    def slow(*_: object, **__: object) -> str:
        path.write_bytes(b"second")
        return "0"

    monkeypatch.setattr(hashing, "hash_stream", slow)
    with FileHasher() as hasher, pytest.raises(OutputError, match="changed while"):
        hasher.sha256(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_leaving_stops_the_threads_at_once(tmp_path, monkeypatch, error):
    monkeypatch.setattr(hashing, "_CHUNK_BYTES", 10)
    begun = threading.Event()

    class Slow:
        def update(self, _: bytes) -> None:
            begun.set()
            time.sleep(0.01)

    for name in "abcd":
        (tmp_path / name).write_bytes(bytes(100_000))
    monkeypatch.setattr(hashing.hashlib, "sha256", Slow)

    def interrupted() -> None:
        with FileHasher() as hasher:
            for name in "abcd":
                hasher.start(tmp_path / name)
            assert begun.wait(5)
            raise error

    start = time.monotonic()
    with pytest.raises(error):
        interrupted()
    # Each file would take 100 seconds.
    assert time.monotonic() - start < 3
    assert not [t for t in threading.enumerate() if t.name.startswith("hash")]


WAITING = """
import sys
from pathlib import Path
from gap_export.bundle import write_bundle
with write_bundle(Path(sys.argv[2])) as draft:
    draft.hasher.start(Path(sys.argv[1]))
    print("hashing", flush=True)
    draft.hasher.sha256(Path(sys.argv[1]))
"""


def test_ctrl_c_while_waiting_for_a_hash_ends_the_process(tmp_path):
    # Sparse: a terabyte that takes no room and minutes to hash.
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(1 << 40)
    command = [sys.executable, "-c", WAITING, tmp_path / "huge", tmp_path / "out"]
    with start_program(command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hashing\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) != 0
    assert {path.name for path in tmp_path.iterdir()} == {"huge"}
