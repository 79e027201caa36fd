"""Graphs kept as they were optimized: the same answers, and nothing that is not what it was."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.bundle import Bundle, open_bundle, stamps
from gap_export.errors import UsageError
from gap_export.runtime.backends import kept_graphs
from gap_export.runtime.backends.backend import DECODER, VISION
from gap_export.runtime.backends.kept_graphs import KeptGraph
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.backends.quiet_onnxruntime import ort
from gap_export.spec.manifest import BASE, ORT, FormName, QuantizationSpec
from tests.shared import SharedExports

CPU = ["CPUExecutionProvider"]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, exports: SharedExports) -> Bundle:
    return open_bundle(
        exports.bundle(
            model=str(tiny_checkpoint),
            pruner="spatial",
            keep_ratio=0.3,
            quantization=QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False),
            activations="int8",
        )
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which small bundles are kept, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_graphs, "MIN_BUNDLE_BYTES", 0)
    return tmp_path / "cache" / "gap-export" / "optimized"


def logits(bundle: Bundle, form: FormName | None = None) -> Any:
    with OnnxRuntimeBackend(bundle, CPU, 1, form=form) as backend:
        ids = np.asarray([[1, 2, 3, 4]])
        feed = {
            "inputs_embeds": backend.run("embed_tokens", {"input_ids": ids})["inputs_embeds"],
            "attention_mask": np.ones((1, 4), np.int64),
            "position_ids": np.arange(4)[None],
            "kept_positions": np.asarray([[0, 2, 5, 9]]),
        }
        return backend.decode(feed, backend.new_cache(1, 4))


def kept(bundle: Bundle, component: str = DECODER, lowering: str = ORT) -> KeptGraph:
    found = KeptGraph.of(bundle, bundle.manifest.graph(component, lowering=lowering))
    assert found is not None
    return found


def without_keeping(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, form: FormName | None = None
) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(kept_graphs, "MIN_BUNDLE_BYTES", 1 << 60)
        return logits(bundle, form)


@pytest.mark.parametrize("form", ["base", "ort"])
def test_a_kept_graph_computes_the_same_to_the_bit(bundle, form, cache, started, monkeypatch):
    lowering = BASE if form == "base" else ORT
    plain = without_keeping(bundle, monkeypatch, form)
    assert not cache.exists()
    assert (logits(bundle, form) == plain).all()
    made = len(started)
    assert (logits(bundle, form) == plain).all()
    again = [path for path, _ in started[made:]]
    # The embedding is a table, which there is nothing to optimize of.
    assert {Path(path).parent for path in again} == {
        kept(bundle, lowering=lowering).folder,
        kept(bundle, VISION, BASE).folder,
        bundle.path,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["graph.onnx", "weights.bin", "kept.json"])
def test_what_was_changed_is_made_anew(bundle, name, caplog, monkeypatch):
    plain = logits(bundle)
    file = kept(bundle).folder / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    file.write_bytes(raw)
    with caplog.at_level(logging.WARNING, logger="gap_export"):
        assert (logits(bundle) == plain).all()
    assert "not usable and made anew" in caplog.text
    assert kept(bundle).check()


def test_a_link_in_its_place_is_not_followed(bundle, tmp_path, caplog):
    plain = logits(bundle)
    file = kept(bundle).folder / "weights.bin"
    file.rename(tmp_path / "elsewhere.bin")
    file.symlink_to(tmp_path / "elsewhere.bin")
    assert (logits(bundle) == plain).all()
    assert "symbolic link" in caplog.text
    assert not file.is_symlink()
    assert (tmp_path / "elsewhere.bin").exists()


def test_another_cpus_is_not_used(bundle, monkeypatch, caplog, started):
    logits(bundle)
    here = kept(bundle).folder
    monkeypatch.setattr(kept_graphs, "describe_cpu", lambda: "Linux x86_64 Another")
    started.clear()
    logits(bundle)
    assert "is of another CPU: making it anew" in caplog.text
    assert str(here / "graph.onnx") not in {path for path, _ in started}
    # Of a home that two machines share, each keeps its own.
    assert here.exists()
    assert kept(bundle).folder != here


def test_only_the_newest_are_held_and_what_a_killed_process_left_goes(bundle, cache, monkeypatch):
    for number in range(5):
        monkeypatch.setattr(kept_graphs, "describe_cpu", lambda n=number: f"CPU {n}")
        logits(bundle)
    root = kept(bundle).root
    assert len(list(root.iterdir())) == 3
    assert kept(bundle).check()
    left = root / ".1-1.part"
    left.mkdir()
    monkeypatch.setattr(kept_graphs, "_PARTS_OLDER_THAN_S", -1.0)
    kept(bundle).tidy()
    assert not left.exists()


@pytest.mark.parametrize("asked", [0, None])
def test_where_none_may_be_kept_none_is_made_or_used(bundle, cache, asked, started, monkeypatch):
    logits(bundle)
    folders = set(cache.glob("*/*"))
    started.clear()
    monkeypatch.setenv(kept_graphs.LIMIT_VARIABLE, "9" if asked == 0 else "0")
    OnnxRuntimeBackend(bundle, CPU, 1, kept_graph_bytes=asked).close()
    assert {Path(path).parent for path, _ in started} == {bundle.path}
    assert set(cache.glob("*/*")) == folders


def test_those_not_used_for_longest_go_where_all_are_too_large(bundle, cache, monkeypatch):
    logits(bundle, "base")
    old, used = kept(bundle, lowering=BASE).folder, kept(bundle, VISION, BASE).folder
    os.utime(old, (1e9, 1e9))
    size = sum(path.stat().st_size for path in (*old.iterdir(), *used.iterdir()))
    monkeypatch.setattr(kept_graphs, "_ROOM", 0.0)
    monkeypatch.setenv(kept_graphs.LIMIT_VARIABLE, str(1.1 * size / 1e9))
    logits(bundle, "ort")
    assert not old.exists() and used.exists() and kept(bundle).check()


@pytest.mark.parametrize("wrong", ["-1", "much", "nan", "inf"])
def test_what_is_no_size_is_refused(bundle, wrong, monkeypatch):
    monkeypatch.setenv(kept_graphs.LIMIT_VARIABLE, wrong)
    with pytest.raises(UsageError, match=f"{kept_graphs.LIMIT_VARIABLE}={wrong}"):
        OnnxRuntimeBackend(bundle, CPU, 1)


def test_full_verification_hashes_what_is_kept_again(bundle, monkeypatch):
    logits(bundle)
    hashed: list[Path] = []
    real = stamps.sha256_of
    monkeypatch.setattr(stamps, "sha256_of", lambda path: hashed.append(path) or real(path))
    monkeypatch.setattr(stamps, "is_settled", lambda status: True)
    assert kept(bundle).check()
    hashed.clear()
    assert kept(bundle).check()
    assert not hashed
    OnnxRuntimeBackend(bundle, CPU, 1, verify="full").close()
    assert kept(bundle).folder / "weights.bin" in hashed


def test_two_at_a_time_do_not_disturb_each_other(bundle, monkeypatch):
    plain = without_keeping(bundle, monkeypatch)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(logits(bundle))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == len(threads)
    assert all((each == plain).all() for each in found)
    assert not [path for path in kept(bundle).root.iterdir() if path.name.startswith(".")]


def test_without_room_or_a_cache_a_bundle_opens_all_the_same(bundle, cache, monkeypatch, caplog):
    plain = without_keeping(bundle, monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    assert (logits(bundle) == plain).all()
    assert "no room to keep optimized graphs" in caplog.text
    monkeypatch.undo()
    cache.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(cache, ignore_errors=True)
    cache.write_text("a file is in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    monkeypatch.setattr(kept_graphs, "MIN_BUNDLE_BYTES", 0)
    assert (logits(bundle) == plain).all()
    assert "cannot be kept" in caplog.text


def test_wrong_options_are_said_as_such(bundle, caplog):
    with pytest.raises(UsageError, match="number of threads"):
        OnnxRuntimeBackend(bundle, CPU, 10**6)
    assert "cannot be kept" not in caplog.text


def test_facts_name_all_that_a_kept_graph_hangs_on(bundle):
    facts = json.loads(json.dumps(dict(kept(bundle).facts)))
    assert ort.__version__ in facts["runtime"]
    assert facts["activations"] == "int8"
    assert facts["graph"] in {file.sha256 for file in bundle.manifest.files}
    assert set(facts) == {"graph", "files", "runtime", "provider", "CPU", "activations"}
