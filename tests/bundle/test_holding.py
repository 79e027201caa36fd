"""Files of somebody else's in a bundle: shared, copied, hashed once, and not changed meanwhile."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle import drafts, hashing, holding, open_bundle, write_bundle
from gap_export.errors import CheckpointError, OutputError
from gap_export.spec.manifest import FileSpec, Manifest

CONTENT = bytes(range(256)) * 40
NAME = "embed_tokens.onnx"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot clone, wherever the tests run."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that can."""

    def clone(target: Any, request: int, source: int) -> int:
        assert request == 0x40049409
        target.write(os.pread(source, 1 << 20, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every piece that was hashed."""
    seen: list[bytes] = []
    real = hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self.digest = real(data)

        def update(self, data: bytes) -> None:
            seen.append(data)
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    monkeypatch.setattr(hashing.hashlib, "sha256", Counting)
    return seen


def export(out: Path, source: Path, manifest: Manifest, *, hold: holding.Hold) -> FileSpec:
    with write_bundle(out) as draft:
        draft.place(source, NAME, hold=hold)
        (spec,) = draft.commit(manifest).files
    return spec


@pytest.mark.usefixtures("no_clones")
def test_link_is_the_source_itself(source, tmp_path, sample_manifest):
    spec = export(tmp_path / "out", source, sample_manifest, hold="link")
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert spec == FileSpec(path=NAME, size=len(CONTENT), sha256=sha256, held="linked")
    assert (tmp_path / "out" / NAME).samefile(source)
    assert open_bundle(tmp_path / "out", verify="full").manifest.files == (spec,)


@pytest.mark.usefixtures("no_clones")
def test_link_to_a_symlink_is_one_to_the_file_behind_it(source, tmp_path, sample_manifest):
    snapshot = tmp_path / "snapshots" / "model.safetensors"
    snapshot.parent.mkdir()
    snapshot.symlink_to(Path("..", "checkpoint", source.name))
    spec = export(tmp_path / "out", snapshot, sample_manifest, hold="link")
    assert spec.held == "linked"
    assert not (tmp_path / "out" / NAME).is_symlink()
    assert (tmp_path / "out" / NAME).samefile(source)


@pytest.mark.usefixtures("no_clones")
def test_copy_is_a_file_of_its_own(source, tmp_path, sample_manifest):
    spec = export(tmp_path / "out", source, sample_manifest, hold="copy")
    copied = tmp_path / "out" / NAME
    assert spec.held == "copied"
    assert copied.read_bytes() == CONTENT
    assert (copied.stat().st_nlink, source.stat().st_nlink) == (1, 1)


@pytest.mark.usefixtures("clones")
@pytest.mark.parametrize("hold", ["link", "copy"])
def test_clone_comes_first_for_both(source, tmp_path, sample_manifest, hold):
    spec = export(tmp_path / "out", source, sample_manifest, hold=hold)
    assert spec.held == "cloned"
    assert (tmp_path / "out" / NAME).stat().st_nlink == 1
    open_bundle(tmp_path / "out", verify="full")


@pytest.mark.usefixtures("no_clones")
@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_what_cannot_be_linked_is_copied_and_said(
    source, tmp_path, sample_manifest, code, monkeypatch, caplog
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with caplog.at_level(logging.INFO):
        spec = export(tmp_path / "out", source, sample_manifest, hold="link")
    assert spec.held == "copied"
    assert f"{source} is copied" in caplog.text
    open_bundle(tmp_path / "out", verify="full")


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or not os.access("/dev/shm", os.W_OK), reason="needs a /dev/shm"
)
def test_source_on_another_device_is_copied(source, tmp_path, sample_manifest):
    other = Path("/dev/shm", f"gap-export-test-{os.getpid()}")
    try:
        other.write_bytes(CONTENT)
        if other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("the temporary folder is in memory as well")
        spec = export(tmp_path / "out", other, sample_manifest, hold="link")
    finally:
        other.unlink()
    assert spec.held == "copied"
    assert (tmp_path / "out" / NAME).read_bytes() == CONTENT


@pytest.mark.usefixtures("no_clones")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failure_to_link_for_want_of_room_is_no_reason_to_copy(
    source, tmp_path, sample_manifest, code, monkeypatch
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        export(tmp_path / "out", source, sample_manifest, hold="link")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_clones")
def test_disk_that_fills_up_half_way_leaves_nothing(source, tmp_path, sample_manifest, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()

    def full(read: Callable[[int], bytes], use: Callable[[bytes], object], **_: object) -> str:
        use(read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(holding, "hash_stream", full)
    with pytest.raises(OutputError, match="no space left on the disk"):
        export(place / "out", source, sample_manifest, hold="copy")
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("no_clones")
@pytest.mark.parametrize("hold", ["link", "copy"])
def test_source_is_hashed_once_whoever_asks(source, tmp_path, sample_manifest, reads, hold):
    with write_bundle(tmp_path / "out") as draft:
        draft.place(source, "model.safetensors", hold=hold)
        draft.place(source, "again.safetensors", hold=hold)
        draft.hasher.start(source)
        assert draft.hasher.sha256(source) == hashlib.sha256(CONTENT).hexdigest()
        draft.commit(sample_manifest)
    assert reads.count(CONTENT) == 1


@pytest.mark.usefixtures("no_clones")
def test_copy_of_what_is_being_hashed_is_not_hashed_again(source, tmp_path, sample_manifest, reads):
    with write_bundle(tmp_path / "out") as draft:
        draft.hasher.start(source)
        draft.place(source, NAME, hold="copy")
        draft.commit(sample_manifest)
    assert reads.count(CONTENT) == 1
    open_bundle(tmp_path / "out", verify="full")


@pytest.mark.usefixtures("no_clones")
@pytest.mark.parametrize("hold", ["link", "copy"])
@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "written-to"])
def test_checkpoint_that_changes_meanwhile_is_refused(
    source, tmp_path, sample_manifest, hold, replaced
):
    def write() -> None:
        with write_bundle(tmp_path / "out") as draft:
            draft.place(source, NAME, hold=hold)
            draft.hasher.sha256(source)
            if replaced:
                source.unlink()
            source.write_bytes(CONTENT[:-1] + b"?")
            os.utime(source, ns=(1, 1))
            draft.commit(sample_manifest)

    with pytest.raises(OutputError, match=f"changed while it was exported: {source}"):
        write()
    assert not (tmp_path / "out").exists()


def test_file_that_only_was_hashed_must_not_change_either(source, tmp_path, sample_manifest):
    def write() -> None:
        with write_bundle(tmp_path / "out") as draft:
            (draft.folder / NAME).write_bytes(b"graph")
            draft.hasher.sha256(source)
            source.unlink()
            draft.commit(sample_manifest)

    with pytest.raises(CheckpointError, match=f"cannot be read: {source}"):
        write()
    assert not (tmp_path / "out").exists()


def test_name_that_is_taken_is_refused(source, tmp_path):
    for hold in ("link", "copy"):
        with write_bundle(tmp_path / "out") as draft:
            (draft.folder / NAME).write_bytes(b"mine")
            with pytest.raises(FileExistsError):
                draft.place(source, NAME, hold=hold)  # type: ignore[arg-type]
            assert (draft.folder / NAME).read_bytes() == b"mine"


def test_folder_or_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        with (
            write_bundle(tmp_path / "out") as draft,
            pytest.raises(CheckpointError, match="not a plain file"),
        ):
            draft.place(tmp_path / name, NAME, hold="link")


@pytest.mark.usefixtures("no_clones")
def test_linked_files_are_not_flushed(source, tmp_path, sample_manifest, monkeypatch):
    flushed: list[str] = []
    real = drafts.sync
    monkeypatch.setattr(drafts, "sync", lambda path: (flushed.append(path.name), real(path)))
    with write_bundle(tmp_path / "out") as draft:
        draft.place(source, "linked", hold="link")
        draft.place(source, "copied", hold="copy")
        draft.commit(sample_manifest)
    assert "copied" in flushed
    assert "gap.json" in flushed
    assert "linked" not in flushed
