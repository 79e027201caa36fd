"""A folder of engines is used only where it is whole, of this bundle, and for this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.engines.folder import (
    EngineFolder,
    check_runs_here,
    engine_folders,
    read_engine_folder,
)
from gap_export.engines.graph_hash import hash_weights
from gap_export.engines.plan import PLAN_NAME, hash_plan
from gap_export.errors import BundleError, UsageError
from gap_export.spec.manifest import Manifest

FOLDER = "rtx-sm89"


@pytest.fixture
def bundle(built_bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(built_bundle.path, tmp_path / "copy"))


def engines_of(bundle: Bundle) -> Path:
    return bundle.path / "engines" / FOLDER


def change_plan(bundle: Bundle, **changes: Any) -> None:
    path = engines_of(bundle) / PLAN_NAME
    plain = json.loads(path.read_bytes())
    plain["engines"][0].update(changes)
    del plain["plan_sha256"]
    plain["plan_sha256"] = hash_plan(plain)
    path.write_text(json.dumps(plain))


def test_a_built_folder_is_read(bundle):
    folder = read_engine_folder(bundle, FOLDER, verify="full")
    assert {engine.component for engine in folder.plan.engines} == {
        graph.component for graph in bundle.manifest.graphs
    }
    assert folder.file("embed_tokens").read_bytes()[:1]
    assert engine_folders(bundle) == (FOLDER,)
    with pytest.raises(BundleError, match="no engine of this component was built: projector"):
        folder.engine("projector")


def link(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


ENGINE = "embed_tokens.engine"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path / ENGINE, 100), "embed_tokens.engine is cut short.* rtx"),
        (lambda path: (path / ENGINE).unlink(), "not complete, missing: embed_tokens.engine"),
        (lambda path: (path / "o.engine").touch(), "rtx-sm89 holds files .* does not list: o.eng"),
        (lambda path: link(path / ENGINE), "a symbolic link"),
        (link, "no link"),
        (lambda path: (path / PLAN_NAME).unlink(), "engine.json is missing"),
        (lambda path: os.truncate(path / PLAN_NAME, 17 << 20), "not a plain file of sensible size"),
        ({"file": "../../gap.json"}, "leaves its folder"),
        ({"graph_sha256": "0" * 64}, "was built from another graph"),
        ({"weights_sha256": "0" * 64}, "was built from other weights"),
        ({"graph": "other.onnx"}, "the bundle has no such file: other.onnx"),
    ],
)
def test_a_folder_that_is_not_whole_or_not_of_this_bundle_is_refused(bundle, damage, message):
    if isinstance(damage, dict):
        change_plan(bundle, **damage)
    else:
        damage(engines_of(bundle))
    with pytest.raises(BundleError, match=message):
        read_engine_folder(bundle, FOLDER)


def test_a_folder_that_is_not_there_is_refused_with_those_that_are(built_bundle):
    with pytest.raises(BundleError, match=r"no such engines: orin-sm87; allowed: rtx-sm89"):
        read_engine_folder(built_bundle, "orin-sm87")
    for name in ("", ".", "..", "a/b", "../engines/rtx-sm89", "a\\b", "a\0b"):
        with pytest.raises(BundleError, match="not the name of a folder of engines"):
            read_engine_folder(built_bundle, name)


@pytest.mark.parametrize("verify", ["stamp", "full"])
def test_a_changed_engine_is_refused_and_named(bundle, verify):
    read_engine_folder(bundle, FOLDER)
    engine = engines_of(bundle) / "embed_tokens.engine"
    content = bytearray(engine.read_bytes())
    content[100] ^= 1
    engine.write_bytes(content)
    with pytest.raises(BundleError, match=r"engine embed_tokens.engine is not what was built"):
        read_engine_folder(bundle, FOLDER, verify=verify)


def test_a_bundle_without_engines_has_no_folders(trt_bundle):
    assert engine_folders(trt_bundle) == ()
    with pytest.raises(BundleError, match="allowed: none built yet"):
        read_engine_folder(trt_bundle, FOLDER)


def test_weights_that_changed_with_the_bundle_are_noticed(bundle):
    """An engine stays behind when the bundle is exported again with other weights."""
    files = tuple(
        dataclasses.replace(f, sha256="a" * 64) if f.path.endswith(".safetensors") else f
        for f in bundle.manifest.files
    )
    manifest: Manifest = dataclasses.replace(bundle.manifest, files=files)
    with pytest.raises(BundleError, match="was built from other weights"):
        read_engine_folder(dataclasses.replace(bundle, manifest=manifest), FOLDER)


@pytest.fixture
def folder(built_bundle: Bundle) -> EngineFolder:
    return read_engine_folder(built_bundle, FOLDER)


def here(folder: EngineFolder, **changes: Any) -> None:
    facts: dict[str, Any] = {
        "library": folder.plan.library,
        "library_version": folder.plan.library_version,
        "compute_capability": folder.plan.compute_capability,
    }
    check_runs_here(folder, **{**facts, **changes})


def test_engines_run_where_they_fit_and_nowhere_else(folder):
    here(folder)
    here(folder, compute_capability=None)
    with pytest.raises(UsageError, match=r"another GPU generation: SM 86 here; allowed: SM 89"):
        here(folder, compute_capability=86)
    version = folder.plan.library_version
    with pytest.raises(UsageError, match=rf"tensorrt_rtx 1.8.0 here; allowed: {version}"):
        here(folder, library_version="1.8.0")
    with pytest.raises(UsageError, match=r"of another library: tensorrt; allowed: tensorrt_rtx"):
        here(folder, library="tensorrt", library_version="10.3.0")


def test_the_hash_of_weights_is_over_the_files_they_lie_in(trt_bundle):
    hashes = {hash_weights(trt_bundle, g.file) for g in trt_bundle.manifest.graphs}
    assert len(hashes) > 1
    (held,) = (f for f in trt_bundle.manifest.files if f.path == "model.safetensors")
    line = f"{held.sha256}  {held.path}\n".encode()
    assert hash_weights(trt_bundle, "embed_tokens.onnx") == hashlib.sha256(line).hexdigest()
