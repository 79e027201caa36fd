"""Opening: anything that is not exactly what the manifest says is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from gap_export.bundle import open_bundle, write_bundle
from gap_export.bundle import stamps as stamps_module
from gap_export.errors import BundleError, OutputError

FILES = ["embed_tokens.onnx", "model.safetensors", "sub/tokenizer.json"]
LISTS = ["gap.json", "gap.json.sha256"]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough for a stamp at once."""
    monkeypatch.setattr(stamps_module, "SETTLE_NS", -(10**12))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_finished_bundle_opens_and_lists_every_file(bundle):
    opened = open_bundle(bundle)
    assert opened.path == bundle
    assert [(f.path, f.held) for f in opened.manifest.files] == [
        ("embed_tokens.onnx", "written"),
        ("model.safetensors", "copied"),
        ("sub/tokenizer.json", "written"),
    ]
    assert opened.file("sub/tokenizer.json").read_bytes() == b"{}"


def test_bundle_opens_from_another_place_and_through_a_link(bundle, copy_of, tmp_path):
    moved = copy_of(bundle)
    (tmp_path / "current").symlink_to(moved)
    assert open_bundle(tmp_path / "current").path == moved


def make_link(path: Path) -> None:
    bundle = next(folder for folder in path.parents if folder.name == "sample-bundle")
    outside = bundle.parent / path.name
    shutil.move(path, outside)
    path.symlink_to(outside)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def add(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        *((name, flip_a_bit, f"{name} is not what it was.*SHA-256") for name in FILES),
        *((name, flip_a_bit, r"gap\.json does not match gap\.json\.sha256") for name in LISTS),
        *((name, Path.unlink, f"not complete, missing: {name}") for name in FILES),
        *((name, Path.unlink, f"{name} is missing") for name in LISTS),
        # Refused even where a link leads to equal bytes, and a pipe is not waited for.
        *((name, make_link, f"a symbolic link: {name}") for name in FILES),
        *((name, make_link, f"{name} is not a plain file") for name in LISTS),
        ("engines", lambda path: path.symlink_to(path.parent.parent), "a symbolic link: engines"),
        ("model.safetensors", make_pipe, "not a plain file: model"),
        *(
            (name, add, f"does not list: {name}")
            for name in ("note.txt", "sub/x", ".hidden", "deep/er/x", "gap.json.bak")
        ),
        # Neither of these is hashed, or read: the large one is sparse.
        (
            "model.safetensors",
            lambda path: os.truncate(path, 100),
            "size: 100 bytes; allowed: 2560",
        ),
        ("gap.json", lambda path: os.truncate(path, 1 << 34), "sensible size"),
    ],
)
def test_damaged_bundle_is_refused(bundle, name, damage, message):
    damage(bundle / name)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_engines_may_be_added_later(bundle):
    (bundle / "engines" / "rtx-sm89").mkdir(parents=True)
    (bundle / "engines" / "rtx-sm89" / "engine.json").write_bytes(b"{}")
    assert open_bundle(bundle).path == bundle


def test_hard_link_is_accepted_since_the_hash_speaks_for_its_bytes(bundle, tmp_path):
    os.link(bundle / "model.safetensors", tmp_path / "hub-cache")
    assert open_bundle(bundle).path == bundle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: {"files": (*m.files, dataclasses.replace(m.files[0], path="../secret"))},
            r"leaves its folder.*'\.\./secret'",
        ),
        (lambda m: {"files": (*m.files, m.files[0])}, r"not twice: embed_tokens\.onnx"),
        (
            lambda m: {"graphs": (dataclasses.replace(m.graphs[0], file="other.onnx"),)},
            r"uses a file that it does not list: other\.onnx",
        ),
    ],
)
def test_manifest_that_lists_files_wrongly_is_refused(bundle, rewrite_manifest, change, message):
    (bundle.parent / "secret").write_bytes(b"x")
    manifest = open_bundle(bundle).manifest
    rewrite_manifest(bundle, manifest, **change(manifest))
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_no_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("missing", "no bundle there"),
        ("file", "this is a file"),
        ("empty", r"not a bundle, or a damaged one: gap\.json is missing"),
    ]:
        with pytest.raises(BundleError, match=message):
            open_bundle(tmp_path / name)


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    real = stamps_module.sha256_of

    def spy(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(stamps_module, "sha256_of", spy)
    return hashed


@pytest.mark.usefixtures("settled")
def test_second_open_hashes_nothing_and_full_hashes_all(bundle, monkeypatch):
    hashed = count_hashes(monkeypatch)
    open_bundle(bundle)
    assert len(hashed) == 3
    open_bundle(bundle)
    assert len(hashed) == 3
    open_bundle(bundle, verify="full")
    assert len(hashed) == 6


def test_files_younger_than_the_clock_can_tell_are_not_stamped(bundle, monkeypatch):
    hashed = count_hashes(monkeypatch)
    open_bundle(bundle)
    open_bundle(bundle)
    assert len(hashed) == 6


@pytest.mark.usefixtures("settled")
def test_changed_byte_with_restored_mtime_is_caught_by_ctime(bundle):
    open_bundle(bundle)
    weights = bundle / "model.safetensors"
    before = weights.stat()
    flip_a_bit(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(BundleError, match=r"model\.safetensors is not what it was"):
        open_bundle(bundle)


@pytest.mark.usefixtures("settled")
def test_forged_stamp_fools_a_stamped_open_but_not_a_full_one(bundle, cache_folder):
    open_bundle(bundle)
    flip_a_bit(bundle / "model.safetensors")
    (stamp,) = cache_folder.rglob("*.json")
    plain = json.loads(stamp.read_text())
    status = (bundle / "model.safetensors").lstat()
    plain["files"]["model.safetensors"] = stamps_module.file_stamp(status)
    stamp.write_text(json.dumps(plain))
    assert open_bundle(bundle).path == bundle
    with pytest.raises(BundleError, match="is not what it was"):
        open_bundle(bundle, verify="full")


@pytest.mark.usefixtures("settled")
def test_stamp_of_another_manifest_is_not_used(bundle, monkeypatch, rewrite_manifest):
    manifest = open_bundle(bundle).manifest
    rewrite_manifest(bundle, manifest, opset=19)
    hashed = count_hashes(monkeypatch)
    assert open_bundle(bundle).manifest.opset == 19
    assert len(hashed) == 3


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"", b"[]", b'{"manifest_sha256": 1}', b"\xff"])
def test_damaged_stamp_only_costs_time(bundle, cache_folder, monkeypatch, content):
    open_bundle(bundle)
    (stamp,) = cache_folder.rglob("*.json")
    stamp.write_bytes(content)
    hashed = count_hashes(monkeypatch)
    open_bundle(bundle)
    assert len(hashed) == 3


@pytest.mark.usefixtures("settled")
def test_cache_that_cannot_be_written_is_no_error(bundle, cache_folder):
    cache_folder.write_bytes(b"a file where the folder should be")
    assert open_bundle(bundle).path == bundle


@pytest.mark.parametrize("change", ["bytes", "size"])
def test_a_linked_file_that_was_changed_at_its_source_says_so(sample_manifest, tmp_path, change):
    source = tmp_path / "checkpoint.safetensors"
    source.write_bytes(b"weights" * 100)
    with write_bundle(tmp_path / "b") as draft:
        draft.place(source, "model.safetensors", hold="link")
        manifest = draft.commit(dataclasses.replace(sample_manifest, graphs=()))
    if {file.held for file in manifest.files} != {"linked"}:
        pytest.skip("this file system clones files, so nothing is linked")
    # In place: a new file of that name would leave the bundle's link alone.
    with source.open("r+b" if change == "bytes" else "ab") as stream:
        stream.write(b"WEIGHTS")
    with pytest.raises(BundleError, match="hard link, and was changed there"):
        open_bundle(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    with pytest.raises(BundleError, match="copy it again"):
        open_bundle(tmp_path / "copy")


def test_folders_without_end_are_refused_and_not_replaced(bundle, write_sample):
    (bundle / "engines" / "/".join("d" * 60)).mkdir(parents=True)
    with pytest.raises(BundleError, match=r"folders without end: engines/d/d/.*allowed: 32 levels"):
        open_bundle(bundle)
    with pytest.raises(OutputError, match="not only a gap-export bundle"):
        write_sample(bundle, force=True)
