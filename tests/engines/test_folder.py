"""A folder of engines is used only where it is whole, of this bundle, and for this machine."""

from __future__ import annotations

import dataclasses
import json
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
from gap_export.engines.graph_hash import hash_weights, weight_files
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


def test_a_component_that_was_not_built_is_named(bundle):
    with pytest.raises(BundleError, match="no engine of this component was built: projector"):
        read_engine_folder(bundle, FOLDER).engine("projector")


def test_a_truncated_engine_is_refused_and_named(bundle):
    engine = engines_of(bundle) / "embed_tokens.engine"
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"engine embed_tokens.engine is cut short.*--target rtx"):
        read_engine_folder(bundle, FOLDER)


@pytest.mark.parametrize("verify", ["stamp", "full"])
def test_a_changed_engine_is_refused_and_named(bundle, verify):
    read_engine_folder(bundle, FOLDER)
    engine = engines_of(bundle) / "embed_tokens.engine"
    content = bytearray(engine.read_bytes())
    content[100] ^= 1
    engine.write_bytes(content)
    with pytest.raises(BundleError, match=r"engine embed_tokens.engine is not what was built"):
        read_engine_folder(bundle, FOLDER, verify=verify)


def test_a_missing_engine_is_named(bundle):
    (engines_of(bundle) / "embed_tokens.engine").unlink()
    with pytest.raises(BundleError, match=r"not complete, missing: embed_tokens.engine"):
        read_engine_folder(bundle, FOLDER)


def test_an_unlisted_file_is_refused(bundle):
    (engines_of(bundle) / "other.engine").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"rtx-sm89 holds files .* does not list: other.engine"):
        read_engine_folder(bundle, FOLDER)


def test_a_link_in_the_folder_is_refused(bundle, tmp_path):
    engine = engines_of(bundle) / "embed_tokens.engine"
    engine.rename(tmp_path / "elsewhere")
    engine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="a symbolic link"):
        read_engine_folder(bundle, FOLDER)


def test_a_linked_folder_is_refused(bundle, tmp_path):
    engines_of(bundle).rename(tmp_path / "elsewhere")
    engines_of(bundle).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="no link"):
        read_engine_folder(bundle, FOLDER)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../engines/rtx-sm89", "a\\b", "a\0b"])
def test_a_name_that_is_no_folder_of_engines_is_refused(bundle, name):
    with pytest.raises(BundleError, match="not the name of a folder of engines"):
        read_engine_folder(bundle, name)


def test_a_folder_that_is_not_there_is_refused_with_those_that_are(bundle):
    with pytest.raises(BundleError, match=r"no such engines: orin-sm87; allowed: rtx-sm89"):
        read_engine_folder(bundle, "orin-sm87")


def test_a_bundle_without_engines_has_no_folders(trt_bundle):
    assert engine_folders(trt_bundle) == ()
    with pytest.raises(BundleError, match="allowed: none built yet"):
        read_engine_folder(trt_bundle, FOLDER)


def test_a_folder_without_engine_json_is_refused(bundle):
    (engines_of(bundle) / PLAN_NAME).unlink()
    with pytest.raises(BundleError, match=r"engine.json is missing"):
        read_engine_folder(bundle, FOLDER)


def test_a_huge_engine_json_is_not_read(bundle):
    with (engines_of(bundle) / PLAN_NAME).open("r+b") as file:
        file.truncate(17 << 20)
    with pytest.raises(BundleError, match="not a plain file of sensible size"):
        read_engine_folder(bundle, FOLDER)


def test_a_path_that_leaves_the_folder_is_refused(bundle):
    change_plan(bundle, file="../../gap.json")
    with pytest.raises(BundleError, match="leaves its folder"):
        read_engine_folder(bundle, FOLDER)


def test_an_engine_of_another_graph_is_refused(bundle):
    change_plan(bundle, graph_sha256="0" * 64)
    with pytest.raises(BundleError, match="was built from another graph"):
        read_engine_folder(bundle, FOLDER)


def test_an_engine_of_other_weights_is_refused(bundle):
    change_plan(bundle, weights_sha256="0" * 64)
    with pytest.raises(BundleError, match="was built from other weights"):
        read_engine_folder(bundle, FOLDER)


def test_an_engine_of_a_graph_that_is_not_there_is_refused(bundle):
    change_plan(bundle, graph="other.onnx")
    with pytest.raises(BundleError, match=r"the bundle has no such file: other.onnx"):
        read_engine_folder(bundle, FOLDER)


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


def test_engines_run_where_they_fit(folder):
    here(folder)
    here(folder, compute_capability=None)


def test_engines_of_another_gpu_are_refused(folder):
    with pytest.raises(UsageError, match=r"another GPU generation: SM 86 here; allowed: SM 89"):
        here(folder, compute_capability=86)


def test_engines_of_another_version_are_refused(folder):
    version = folder.plan.library_version
    with pytest.raises(UsageError, match=rf"tensorrt_rtx 1.8.0 here; allowed: {version}"):
        here(folder, library_version="1.8.0")


def test_engines_of_the_other_library_are_refused(folder):
    with pytest.raises(UsageError, match=r"of another library: tensorrt; allowed: tensorrt_rtx"):
        here(folder, library="tensorrt", library_version="10.3.0")


def test_the_hash_of_weights_is_over_the_files_they_lie_in(trt_bundle):
    assert weight_files(trt_bundle, "embed_tokens.onnx") == ("model.safetensors",)
    files = weight_files(trt_bundle, "vision_encoder.onnx")
    assert list(files) == sorted(files) and len(files) > 1
    hashes = {hash_weights(trt_bundle, g.file) for g in trt_bundle.manifest.graphs}
    assert len(hashes) > 1
