"""Opening: anything that is not exactly what the manifest says is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gap_export.bundle import open_bundle, write_bundle
from gap_export.bundle import stamps as stamps_module
from gap_export.errors import BundleError, OutputError
from gap_export.spec.manifest import Manifest

FILES = ["embed_tokens.onnx", "model.safetensors", "sub/tokenizer.json"]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough for a stamp at once."""
    monkeypatch.setattr(stamps_module, "SETTLE_NS", -(10**12))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_finished_bundle_opens_and_lists_every_file(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.path == bundle
    assert [(f.path, f.held) for f in opened.manifest.files] == [
        ("embed_tokens.onnx", "written"),
        ("model.safetensors", "copied"),
        ("sub/tokenizer.json", "written"),
    ]
    assert opened.file("sub/tokenizer.json").read_bytes() == b"{}"


def test_bundle_opens_from_another_place_and_through_a_link(
    bundle: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    moved = copy_of(bundle)
    (tmp_path / "current").symlink_to(moved)
    assert open_bundle(tmp_path / "current").path == moved


@pytest.mark.parametrize("name", FILES)
def test_changed_byte_is_refused(bundle: Path, name: str) -> None:
    flip_a_bit(bundle / name)
    with pytest.raises(BundleError, match=f"{name} is not what it was.*SHA-256"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["gap.json", "gap.json.sha256"])
def test_changed_byte_in_the_manifest_or_its_hash_is_refused(bundle: Path, name: str) -> None:
    flip_a_bit(bundle / name)
    with pytest.raises(BundleError, match=r"gap\.json does not match gap\.json\.sha256"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused_by_name(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"not complete, missing: {name}"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["gap.json", "gap.json.sha256"])
def test_missing_manifest_or_hash_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_bundle(bundle)


def test_shortened_file_is_refused_without_hashing(bundle: Path) -> None:
    os.truncate(bundle / "model.safetensors", 100)
    with pytest.raises(BundleError, match="wrong size: 100 bytes; allowed: 2560 bytes"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["note.txt", "sub/x", ".hidden", "deep/er/x", "gap.json.bak"])
def test_unlisted_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=f"does not list: {name}"):
        open_bundle(bundle)


def test_engines_may_be_added_later(bundle: Path) -> None:
    (bundle / "engines" / "rtx-sm89").mkdir(parents=True)
    (bundle / "engines" / "rtx-sm89" / "engine.json").write_bytes(b"{}")
    assert open_bundle(bundle).path == bundle


@pytest.mark.parametrize("name", FILES)
def test_symbolic_link_is_refused_even_to_equal_bytes(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    shutil.move(bundle / name, outside)
    (bundle / name).symlink_to(outside)
    with pytest.raises(BundleError, match=f"a symbolic link: {name}"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["gap.json", "gap.json.sha256"])
def test_linked_manifest_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.move(bundle / name, tmp_path / name)
    (bundle / name).symlink_to(tmp_path / name)
    with pytest.raises(BundleError, match=f"{name} is not a plain file"):
        open_bundle(bundle)


def test_linked_folder_is_refused_below_engines_too(bundle: Path, tmp_path: Path) -> None:
    (bundle / "engines").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="a symbolic link: engines"):
        open_bundle(bundle)


def test_pipe_is_refused_rather_than_waited_for(bundle: Path) -> None:
    (bundle / "model.safetensors").unlink()
    os.mkfifo(bundle / "model.safetensors")
    with pytest.raises(BundleError, match="not a plain file: model"):
        open_bundle(bundle)


def test_hard_link_is_accepted_since_the_hash_speaks_for_its_bytes(
    bundle: Path, tmp_path: Path
) -> None:
    os.link(bundle / "model.safetensors", tmp_path / "hub-cache")
    assert open_bundle(bundle).path == bundle


def test_newer_manifest_version_is_refused(
    bundle: Path, rewrite_manifest: Callable[..., None]
) -> None:
    plain = json.loads((bundle / "gap.json").read_bytes())
    rewrite_manifest(bundle, json.dumps({**plain, "format_version": 2}).encode())
    with pytest.raises(BundleError, match="version not supported: 2; allowed: 1; upgrade"):
        open_bundle(bundle)


def test_path_outside_the_folder_is_refused_before_it_is_read(
    bundle: Path, tmp_path: Path, rewrite_manifest: Callable[..., None]
) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    manifest = open_bundle(bundle).manifest
    file = dataclasses.replace(manifest.files[0], path="../secret")
    rewrite_manifest(bundle, manifest, files=(*manifest.files, file))
    with pytest.raises(BundleError, match=r"leaves its folder.*'\.\./secret'"):
        open_bundle(bundle)


def test_file_listed_twice_is_refused(bundle: Path, rewrite_manifest: Callable[..., None]) -> None:
    manifest = open_bundle(bundle).manifest
    rewrite_manifest(bundle, manifest, files=(*manifest.files, manifest.files[0]))
    with pytest.raises(BundleError, match=r"not twice: embed_tokens\.onnx"):
        open_bundle(bundle)


def test_graph_that_is_not_listed_is_refused(
    bundle: Path, rewrite_manifest: Callable[..., None]
) -> None:
    manifest: Manifest = open_bundle(bundle).manifest
    graph = dataclasses.replace(manifest.graphs[0], file="other.onnx")
    rewrite_manifest(bundle, manifest, graphs=(graph,))
    with pytest.raises(BundleError, match=r"uses a file that it does not list: other\.onnx"):
        open_bundle(bundle)


def test_huge_manifest_is_refused_without_being_read(bundle: Path) -> None:
    with (bundle / "gap.json").open("r+b") as file:
        file.truncate(1 << 34)  # sparse: takes no room
    with pytest.raises(BundleError, match="sensible size"):
        open_bundle(bundle)


def test_no_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
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
def test_second_open_hashes_nothing_and_full_hashes_all(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = count_hashes(monkeypatch)
    open_bundle(bundle)
    assert len(hashed) == 3
    open_bundle(bundle)
    assert len(hashed) == 3
    open_bundle(bundle, verify="full")
    assert len(hashed) == 6


def test_files_younger_than_the_clock_can_tell_are_not_stamped(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = count_hashes(monkeypatch)
    open_bundle(bundle)
    open_bundle(bundle)
    assert len(hashed) == 6


@pytest.mark.usefixtures("settled")
def test_changed_byte_with_restored_mtime_is_caught_by_ctime(bundle: Path) -> None:
    open_bundle(bundle)
    weights = bundle / "model.safetensors"
    before = weights.stat()
    flip_a_bit(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(BundleError, match=r"model\.safetensors is not what it was"):
        open_bundle(bundle)


@pytest.mark.usefixtures("settled")
def test_forged_stamp_fools_a_stamped_open_but_not_a_full_one(
    bundle: Path, cache_folder: Path
) -> None:
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
def test_stamp_of_another_manifest_is_not_used(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, rewrite_manifest: Callable[..., None]
) -> None:
    manifest = open_bundle(bundle).manifest
    rewrite_manifest(bundle, manifest, opset=19)
    hashed = count_hashes(monkeypatch)
    assert open_bundle(bundle).manifest.opset == 19
    assert len(hashed) == 3


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"", b"[]", b'{"manifest_sha256": 1}', b"\xff"])
def test_damaged_stamp_only_costs_time(
    bundle: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    open_bundle(bundle)
    (stamp,) = cache_folder.rglob("*.json")
    stamp.write_bytes(content)
    hashed = count_hashes(monkeypatch)
    open_bundle(bundle)
    assert len(hashed) == 3


@pytest.mark.usefixtures("settled")
def test_cache_that_cannot_be_written_is_no_error(bundle: Path, cache_folder: Path) -> None:
    cache_folder.write_bytes(b"a file where the folder should be")
    assert open_bundle(bundle).path == bundle


@pytest.mark.parametrize("change", ["bytes", "size"])
def test_a_linked_file_that_was_changed_at_its_source_says_so(
    sample_manifest: Manifest, tmp_path: Path, change: str
) -> None:
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


def test_folders_without_end_are_refused_and_not_replaced(
    bundle: Path, write_sample: Callable[..., Path]
) -> None:
    (bundle / "engines" / "/".join("d" * 60)).mkdir(parents=True)
    with pytest.raises(BundleError, match=r"folders without end: engines/d/d/.*allowed: 32 levels"):
        open_bundle(bundle)
    with pytest.raises(OutputError, match="not only a gap-export bundle"):
        write_sample(bundle, force=True)
