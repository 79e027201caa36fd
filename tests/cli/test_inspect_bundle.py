"""``gap-export inspect``."""

from __future__ import annotations

import shutil
from dataclasses import replace

import onnx
import pytest

from gap_export.bundle import Bundle, open_bundle, write_bundle
from gap_export.cli import inspect_bundle
from gap_export.engines.build import build_engines
from gap_export.spec.manifest import PreflightVerdict, SourceSpec, TilesSpec
from tests.engines.bundles import SKIP_RTX, SM89, copy_for_engines


def test_gap_remap_is_found_where_onnx_sees_it(run_cli, tiny_bundle):
    graph = onnx.load(tiny_bundle / "decoder_model_merged.onnx", load_external_data=False).graph
    (node,) = [n for n in graph.node if n.op_type == "GapRemap"]
    readers = [n.name for n in graph.node if node.output[0] in n.input]
    assert readers

    remap, own = run_cli("inspect", tiny_bundle, "--json").plain["gap_remap"]
    assert (own["file"], own["inputs"]) == ("decoder_model_merged_ort_fp32.onnx", remap["inputs"])
    assert (remap["file"], remap["node"]) == ("decoder_model_merged.onnx", node.name)
    assert (remap["domain"], remap["inputs"]) == ("gap_export", ["position_ids", "kept_positions"])
    assert [consumer["node"] for consumer in remap["consumers"]] == readers

    text = run_cli("inspect", tiny_bundle).out
    assert f"GapRemap in decoder_model_merged.onnx: node {node.name}, domain gap_export" in text
    assert all(name in text for name in readers)


def test_tokens_and_sizes_add_up(run_cli, tiny_bundle):
    plain = run_cli("inspect", tiny_bundle, "--json").plain
    files = [path for path in tiny_bundle.rglob("*") if path.is_file()]
    listed = sum(p.stat().st_size for p in files if not p.name.startswith("gap.json"))
    assert plain["size_bytes"] == listed
    # 2 layers, 2 key and value heads of 8, fp32; 16 - 5 visual tokens dropped.
    assert plain["tokens"]["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert plain["tokens"]["kv_cache_bytes_saved"] == 11 * 256


def test_the_text_names_model_pruning_graphs_and_files(run_cli, tiny_bundle):
    text = run_cli("inspect", tiny_bundle).out
    for words in (
        "tiny-llava (family llava, Apache-2.0): random weights, for tests",
        "pruning    spatial, keep 0.3, order raster, extra token none",
        "positions  gap",
        "5 of 16 visual tokens, 4x4 grid; ids up to 255",
        "nothing shared",
        "graphs     float32, opset ",
        "source     main: ",
        "<- past_key_values.{i}.key [batch_size, 2, past_sequence_length, 8] float32 (x2)",
        "-> logits [batch_size, 1, ",
        "tokenizer.json",
    ):
        assert words in text


def test_random_weights_tiles_and_links_are_marked(tiny_bundle, sample_manifest):
    opened = open_bundle(tiny_bundle)
    manifest = replace(
        opened.manifest,
        source=SourceSpec(parts=(), random_seed=7),
        image=replace(
            sample_manifest.image, preparation="anyres", tiles=TilesSpec(resolutions=((32, 64),))
        ),
        files=(replace(opened.manifest.files[0], held="cloned"), *opened.manifest.files[1:]),
        dtype="float16",
    )
    tokens = inspect_bundle._token_accounting(manifest)
    text = inspect_bundle._describe_model(Bundle(path=opened.path, manifest=manifest), manifest)
    text += inspect_bundle._describe_tokens(tokens, manifest)
    for words in (
        "none: RANDOM weights, seed 7",
        "cloned from the checkpoint",
        "float16",
        "5 of 16 visual tokens of each tile (up to 3 tiles: at most 15 of 48,",
        "a tile saved",
    ):
        assert words in text


def test_links_that_a_copy_of_the_bundle_has_not_got_are_history(tiny_bundle, tmp_path):
    opened = open_bundle(tiny_bundle)
    (name,) = [f.path for f in opened.manifest.files if f.path.endswith(".safetensors")]
    files = tuple(
        replace(f, held="linked" if f.path == name else "written") for f in opened.manifest.files
    )
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    bundle = Bundle(path=copy, manifest=replace(opened.manifest, files=files))
    assert "of which nothing shared" in inspect_bundle._describe_model(bundle, bundle.manifest)
    assert "was linked" in inspect_bundle._describe_files(bundle)
    (tmp_path / "checkpoint.safetensors").hardlink_to(copy / name)
    assert "linked to the checkpoint" in inspect_bundle._describe_model(bundle, bundle.manifest)
    assert "was linked" not in inspect_bundle._describe_files(bundle)


@pytest.fixture
def trt_bundle(tiny_text_bundle, tmp_path):
    """Made for every target, with a verdict for one; no engines yet."""
    made = copy_for_engines(tiny_text_bundle, tmp_path / "trt")
    verdict = PreflightVerdict(
        component="vision_encoder",
        verdict="unverified",
        operators=("CumSum",),
        reasons=("TensorRT 10.3: CumSum of int64 is not among float32",),
    )
    targets = tuple(
        replace(t, preflight=(verdict,)) if t.name == "orin" else t for t in made.manifest.targets
    )
    out = tmp_path / "judged"
    with write_bundle(out) as draft:
        for file in made.manifest.files:
            draft.place(made.file(file.path), file.path, hold="link")
        draft.commit(replace(made.manifest, targets=targets))
    return out


def test_targets_are_told_with_their_verdicts(run_cli, trt_bundle):
    text = run_cli("inspect", trt_bundle).out
    assert "for prompts of up to 40 tokens, answers of up to 8, 2 at a time" in text
    assert "target orin (portable, float32)" in text
    assert "  vision_encoder: unverified (CumSum)" in text
    assert "    TensorRT 10.3: CumSum of int64 is not among float32" in text


def test_a_bundle_without_targets_says_nothing_of_them(run_cli, tiny_bundle):
    outcome = run_cli("inspect", tiny_bundle)
    assert "target " not in outcome.out
    assert run_cli("inspect", tiny_bundle, "--json").plain["engines"] == []


def test_engines_are_told_with_what_they_were_built_from(run_cli, trt_bundle):
    pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)
    build_engines(open_bundle(trt_bundle), SM89, only=("decoder_model_merged",))
    (folder,) = run_cli("inspect", trt_bundle, "--json").plain["engines"]
    assert (folder["folder"], folder["problem"]) == ("rtx-sm89", None)
    assert folder["library"].startswith("tensorrt_rtx 1.")
    built = {engine["component"]: engine for engine in folder["engines"]}
    assert built["decoder_model_merged"]["profiles"] == ["prefill", "decode"]
    text = run_cli("inspect", trt_bundle).out
    assert "engines/rtx-sm89: tensorrt_rtx 1." in text
    assert "profiles prefill and decode" in text


def test_engines_that_cannot_be_used_are_told_with_the_reason(run_cli, trt_bundle):
    folder = trt_bundle / "engines" / "orin-sm87"
    folder.mkdir(parents=True)
    (folder / "vision_encoder.engine").write_bytes(b"by trtexec")
    outcome = run_cli("inspect", trt_bundle)
    assert outcome.code == 0
    assert "engines/orin-sm87: cannot be used: " in outcome.out
    assert "engine.json is missing" in outcome.out
