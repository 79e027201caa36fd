"""Writing: all or nothing, and never over what is not ours."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle import BundleDraft, drafts, open_bundle, write_bundle, writing
from gap_export.bundle.drafts import exchange
from gap_export.errors import BundleError, CheckpointError, OutputError
from tests.programs import run_program, start_program


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An otherwise empty folder to write into."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def test_bundle_appears_under_its_name_and_nothing_beside_it(place, write_sample):
    write_sample(place / "out")
    assert names(place) == {"out"}
    assert names(place / "out") == {
        "embed_tokens.onnx", "gap.json", "gap.json.sha256", "model.safetensors", "sub",
    }  # fmt: skip


def test_hash_file_is_what_sha256sum_reads(place, write_sample):
    out = write_sample(place / "out")
    done = run_program(["sha256sum", "-c", "gap.json.sha256"], cwd=out)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_interrupted_write_leaves_nothing(place, error):
    def interrupted() -> None:
        with write_bundle(place / "deep" / "er" / "out") as draft:
            (draft.folder / "half.onnx").write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert names(place) == set()


def test_draft_without_commit_leaves_nothing(place):
    with write_bundle(place / "out") as draft:
        (draft.folder / "half.onnx").write_bytes(b"half")
        assert not (place / "out").exists()
    assert names(place) == set()


def test_interrupt_while_replacing_keeps_the_old_bundle(place, write_sample):
    out = write_sample(place / "out")
    before = contents(out)

    def interrupted() -> None:
        with write_bundle(out, force=True) as draft:
            (draft.folder / "half.onnx").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(out) == before
    assert names(place) == {"out"}


def interrupt(monkeypatch: Any, owner: Any, name: str, error: BaseException, *, call: int) -> None:
    """Have a function of a module or class done as ever, and its n-th call fail after that."""
    real, calls = getattr(owner, name), []

    def interrupted(*names: Path) -> Any:
        done = real(*names)
        calls.append(names)
        if len(calls) == call:
            raise error
        return done

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("step", ["exchange", "rename 1", "rename 2"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_interrupt_right_after_a_step_puts_the_old_bundle_back(
    place, write_sample, monkeypatch, step, error
):
    out = write_sample(place / "out")
    before = contents(out)
    if step == "exchange":
        interrupt(monkeypatch, drafts, "exchange", error, call=1)
    else:
        monkeypatch.setattr(drafts, "exchange", lambda one, other: False)
        interrupt(monkeypatch, Path, "rename", error, call=int(step[-1]))
    with pytest.raises(type(error)):
        write_sample(out, force=True, graph=b"another graph")
    assert contents(out) == before
    assert names(place) == {"out"}


def test_interrupt_right_after_the_rename_of_a_first_write_leaves_nothing(
    place, write_sample, monkeypatch
):
    interrupt(monkeypatch, Path, "rename", KeyboardInterrupt(), call=1)
    with pytest.raises(KeyboardInterrupt):
        write_sample(place / "out")
    assert names(place) == set()


def test_folder_that_takes_the_name_at_the_last_moment_is_given_it_back(
    place, foreign_folder, write_sample, monkeypatch
):
    out = write_sample(place / "out")

    def late(one: Path, other: Path) -> bool:
        if foreign_folder.exists():
            out.rename(place / "moved")
            foreign_folder.rename(out)
        return exchange(one, other)

    monkeypatch.setattr(drafts, "exchange", late)
    with pytest.raises(OutputError, match="taken by another process meanwhile"):
        write_sample(out, force=True)
    assert contents(out) == {"diary.txt": b"dear diary"}
    assert names(place) == {"out", "moved"}


# Kills itself before or after the n-th call that changes names, or in the middle of the removal.
KILLED_REPLACER = """
import os, shutil, signal, sys
from pathlib import Path
from gap_export.bundle import drafts, open_bundle, write_bundle
out, way, point = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def die(): os.kill(os.getpid(), signal.SIGKILL)
def dying(real, name):
    def call(*args, **options):
        if point == f"before {name}": die()
        done = real(*args, **options)
        if point == f"after {name}": die()
        return done
    return call
drafts.exchange = dying(drafts.exchange, "exchange") if way == "exchange" else lambda *_: False
renames = []
real = Path.rename
def rename(self, target):
    renames.append(target)
    return dying(real, f"rename {len(renames)}")(self, target)
Path.rename = rename
def remove(folder, **options):
    (Path(folder) / "gap.json").unlink()
    die()
if point == "in removal": shutil.rmtree = remove
manifest = open_bundle(out).manifest
with write_bundle(out, force=True) as draft:
    for file in manifest.files:
        draft.place(out / file.path, file.path, hold="copy")
    (draft.folder / "embed_tokens.onnx").write_bytes(b"another graph")
    draft.commit(manifest)
"""


@pytest.mark.parametrize(
    ("way", "point", "stands"),
    [
        ("exchange", "before exchange", "old"),
        ("exchange", "after exchange", "new"),
        ("exchange", "in removal", "new"),
        ("two steps", "before rename 1", "old"),
        ("two steps", "after rename 1", "old, set aside"),
        ("two steps", "after rename 2", "new"),
        ("two steps", "in removal", "new"),
    ],
)
def test_bundle_that_is_replaced_stands_whenever_its_writer_is_killed(
    place, write_sample, caplog, way, point, stands
):
    out = write_sample(place / "out")
    killed = run_program([sys.executable, "-c", KILLED_REPLACER, out, way, point])
    assert killed.returncode == -signal.SIGKILL
    opened = open_bundle(out, verify="full")
    graph = opened.file("embed_tokens.onnx").read_bytes()
    assert graph == (b"another graph" if stands == "new" else b"a graph")
    assert (opened.path == out) == (stands != "old, set aside")
    assert ("out is missing" in caplog.text) == (stands == "old, set aside")
    write_sample(out, force=True)
    assert names(place) == {"out"}


KILLED_WRITER = """
import sys
from pathlib import Path
from gap_export.bundle import write_bundle
with write_bundle(Path(sys.argv[1])) as draft:
    (draft.folder / "half.onnx").write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_kill_9_in_the_middle_leaves_no_bundle_and_the_next_write_sweeps(place, write_sample):
    with start_program([sys.executable, "-c", KILLED_WRITER, place / "out"]) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        # A living writer's draft is not swept by another one.
        (draft,) = names(place)
        write_sample(place / "out")
        assert names(place) == {"out", draft}
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
    assert (place / draft / "half.onnx").exists()
    assert open_bundle(place / "out").path == place / "out"
    write_sample(place / "out", force=True)
    assert names(place) == {"out"}


def test_bundle_set_aside_by_a_dead_writer_is_put_back(place, write_sample):
    out = write_sample(place / "out")
    before = contents(out)
    out.rename(place / ".out.gap-replaced-0a1b2c3d")
    with pytest.raises(OutputError, match="holds a bundle already"):
        write_sample(out)
    with write_bundle(place / "out", force=True):
        assert contents(out) == before


def test_hidden_folders_of_others_are_not_swept(place, write_sample):
    others = {".other.gap-draft-0a1b2c3d", ".out", ".out.backup"}
    for name in others:
        (place / name).mkdir()
    write_sample(place / "out")
    assert names(place) == {"out"} | others


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"format": "another"}'])
def test_foreign_folder_is_never_touched(foreign_folder, force, content, write_sample):
    if content is not None:
        (foreign_folder / "gap.json").write_bytes(content)
    before = contents(foreign_folder)
    reason = r".*no gap\.json" if content is None else ""
    with pytest.raises(OutputError, match=f"not only a gap-export bundle{reason}"):
        write_sample(foreign_folder, force=force)
    assert contents(foreign_folder) == before


def test_bundle_with_a_foreign_file_in_it_is_not_replaced(place, write_sample):
    out = write_sample(place / "out")
    (out / "notes.txt").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"it holds notes\.txt, which the bundle does not list"):
        write_sample(out, force=True)
    assert (out / "notes.txt").read_bytes() == b"mine"


def test_bundle_is_replaced_only_with_force_and_its_engines_go_too(place, write_sample):
    out = write_sample(place / "out", graph=b"old")
    (out / "engines").mkdir()
    (out / "engines" / "old.engine").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"holds a bundle already.*--force"):
        write_sample(out, graph=b"new")
    assert (out / "embed_tokens.onnx").read_bytes() == b"old"
    write_sample(out, graph=b"new", force=True)
    assert open_bundle(out).file("embed_tokens.onnx").read_bytes() == b"new"
    assert names(place) == {"out"}
    assert not (out / "engines").exists()


def test_damaged_bundle_may_be_replaced(place, write_sample):
    out = write_sample(place / "out")
    (out / "model.safetensors").unlink()
    with pytest.raises(BundleError):
        open_bundle(out)
    write_sample(out, force=True)
    assert open_bundle(out).path == out


def test_empty_folder_is_used(place, write_sample):
    (place / "out").mkdir()
    assert open_bundle(write_sample(place / "out")).path == place / "out"


def test_file_or_link_in_the_way_is_refused(place, foreign_folder, write_sample):
    (place / "file").write_bytes(b"x")
    (place / "link").symlink_to(foreign_folder)
    (place / "dangling").symlink_to(place / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(OutputError, match="in the way: not a folder"):
            write_sample(place / name, force=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write_sample(place / "file" / "out")
    assert names(place) == {"file", "link", "dangling"}


def test_name_taken_while_writing_is_refused(place, sample_manifest, foreign_folder):
    def write() -> None:
        with write_bundle(place / "out", force=True) as draft:
            (draft.folder / "embed_tokens.onnx").write_bytes(b"x")
            foreign_folder.rename(place / "out")
            draft.commit(sample_manifest)

    with pytest.raises(OutputError, match="not only a gap-export bundle"):
        write()
    assert contents(place / "out") == {"diary.txt": b"dear diary"}
    assert names(place) == {"out"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_clear_error_and_leaves_nothing(place, write_sample, monkeypatch, code):
    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing, "sync_tree", full)
    with pytest.raises(OutputError, match=r"cannot be written: .*out: (no space|the disk quota)"):
        write_sample(place / "out")
    assert names(place) == set()


def test_full_disk_while_copying_is_one_clear_error(place, tmp_path, monkeypatch):
    source = tmp_path / "big"
    source.write_bytes(b"x" * 100)
    real_open = Path.open

    def open_full(path: Path, mode: str = "r", **options: object) -> object:
        if "x" in mode:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real_open(path, mode, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_full)

    def write() -> None:
        with write_bundle(place / "out") as draft:
            draft.place(source, "model.safetensors", hold="copy")

    with pytest.raises(OutputError, match="no space left on the disk"):
        write()
    assert names(place) == set()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_place_without_permission_is_one_clear_error(place, write_sample):
    place.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=r"cannot be written: .*Permission denied"):
            write_sample(place / "out")
    finally:
        place.chmod(0o700)


def test_denied_mkdir_is_one_clear_error(place, write_sample, monkeypatch):
    def denied(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(OutputError, match=r"cannot be written: .*Permission denied"):
        write_sample(place / "out")


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        *((name, False) for name in ("shard.bin", "out.bin", ".out.gap-draftless", "sub/out")),
        *((name, True) for name in ("out", "out/sub/file", ".out.gap-draft-1234/file", "")),
    ],
)
def test_only_a_file_of_the_output_is_blamed_on_it(place, name, blamed):
    error = PermissionError(errno.EACCES, "Permission denied", str(place / name))
    raised, words = (OutputError, "cannot be written: ") if blamed else (PermissionError, "")
    with pytest.raises(raised, match=f"{words}.*Permission denied"), write_bundle(place / "out"):
        raise error
    assert not names(place)


def test_missing_source_is_not_blamed_on_the_output(place):
    def write() -> None:
        with write_bundle(place / "out") as draft:
            draft.place(place.parent / "no-such-weights", "model.safetensors", hold="copy")

    with pytest.raises(CheckpointError, match=r"cannot be read: .*no-such-weights"):
        write()
    assert names(place) == set()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", ""])
def test_copy_to_outside_of_the_draft_is_refused(place, name):
    def write(draft: BundleDraft) -> None:
        draft.place(Path(__file__), name, hold="copy")

    with write_bundle(place / "out") as draft, pytest.raises(BundleError, match="leaves its"):
        write(draft)
    assert names(place) == set()


def test_file_changed_after_copying_is_hashed_again(place, tmp_path, sample_manifest):
    source = tmp_path / "weights"
    source.write_bytes(b"weights")
    with write_bundle(place / "out") as draft:
        draft.place(source, "embed_tokens.onnx", hold="copy")
        (draft.folder / "embed_tokens.onnx").write_bytes(b"longer weights")
        manifest = draft.commit(sample_manifest)
    assert manifest.files[0].held == "written"
    assert open_bundle(place / "out").manifest == manifest


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a Linux /proc")
def test_a_place_that_takes_no_folders_is_refused():
    with pytest.raises(OutputError, match="no folder can be made"), write_bundle("/proc/bundle"):
        pass


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "volume"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    with pytest.raises(OutputError, match="a mount point") as caught, write_bundle(out):
        raise AssertionError("nothing is to be written")
    assert str(out / "bundle") in str(caught.value)
    assert list(out.iterdir()) == []
