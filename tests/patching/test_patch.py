"""Exports that torch made, patched: what is in the bundle, and that it computes what it must."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml

from gap_export import GroundingSession
from gap_export.bundle import open_bundle
from gap_export.errors import OutputError, UsageError
from gap_export.evaluation.evaluate import evaluate_bundle
from gap_export.parity.patched.masked_oracle import compare_with_unpatched
from gap_export.patching import PatchOptions, patch_export
from gap_export.spec.manifest import GridSpec
from gap_export.spec.places import lattice_places
from gap_export.spec.requests import PruningRequest
from tests.programs import run_program

EXPRESSIONS = ["the red circle", "the small blue star above the circle"]

KEEP = PruningRequest(keep_ratio=0.3)
SAMPLE = [{}, {"dtype": "float16"}]
# torch's first exporter ends at opset 20; its second begins at 18 and says so for 17.
EVERY = [
    {"opset": opset, "dtype": dtype, "dynamo": dynamo, "attention": attention}
    for dynamo, opsets in ((False, range(17, 21)), (True, range(18, 24)))
    for opset in opsets
    for dtype in ("float32", "float16")
    for attention in ("sdpa", "eager")
    # The second exporter takes half a minute, and what it makes of eager attention varies little.
    if not dynamo or attention == "sdpa" or (opset in (18, 23) and dtype == "float32")
]


def tree_hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_against_unpatched(patch, export, images, *, pruner):
    report = patch(export, pruner=pruner)
    verdict = compare_with_unpatched(report.bundle, export, images, EXPRESSIONS)
    assert verdict.passed, verdict
    # Far from the tolerance: what is compared is of size 5.
    assert verdict.compact_max_abs_diff > 0.5
    return report


@pytest.mark.parametrize("pruner", ["spatial", "random", "cls", "fastervlm"])
@pytest.mark.parametrize("how", SAMPLE, ids=str)
def test_logits_are_those_of_the_unpatched_graphs_with_dropped_tokens_hidden(
    make_export, patch, images, how, pruner
):
    check_against_unpatched(patch, make_export(**how), images, pruner=pruner)


@pytest.mark.full
@pytest.mark.parametrize("how", EVERY, ids=str)
def test_every_opset_dtype_and_exporter(make_export, patch, images, how):
    export = make_export(**how)
    report = check_against_unpatched(patch, export, images, pruner="spatial")
    assert report.manifest.opset == how["opset"]
    check_against_unpatched(patch, export, images, pruner="cls")
    if how["dynamo"] and how["opset"] >= 23 and how["attention"] == "sdpa":
        with pytest.raises(UsageError, match="does not show what CLS attends to: Attention"):
            patch(export, pruner="fastervlm")
    else:
        check_against_unpatched(patch, export, images, pruner="fastervlm")


def test_a_patched_bundle_grounds_with_the_tokens_it_kept(tiny_export, patch, images):
    report = patch(tiny_export)
    assert report.rotary == ("Cos /model/rotary_emb/Cos", "Sin /model/rotary_emb/Sin")
    assert report.warnings == ()
    with GroundingSession.open(report.bundle) as session:
        grounding = session.ground(images[0], EXPRESSIONS[0])
        both = session.ground_batch(images[0], EXPRESSIONS)
    places = lattice_places(GridSpec(rows=4, cols=4), num_kept_tokens=5)
    assert grounding.keep_indices == tuple(places.tolist())
    # Rows of one batch are what they are alone: left padding and slots fit the graph, too.
    assert both[0].token_ids == grounding.token_ids


def test_the_manifest_says_what_was_patched(tiny_export, patch):
    report = patch(tiny_export, pruner="random", seed=7, positions="compact")
    manifest = open_bundle(report.bundle, verify="full").manifest
    pruning = manifest.pruning
    assert (pruning.pruner, pruning.seed, pruning.positions) == ("random", 7, "compact")
    assert (pruning.num_visual_tokens, pruning.num_kept_tokens) == (16, 5)
    assert manifest.model.name == "tiny-llava"
    assert manifest.model.summary.endswith("patched from an ONNX export")
    assert (manifest.dtype, manifest.opset) == ("float32", 17)
    decoder = manifest.decoder
    assert (decoder.num_layers, decoder.num_key_value_heads, decoder.head_dim) == (2, 2, 8)
    assert (decoder.hidden_size, decoder.vocab_size) == (32, 125)
    assert (decoder.max_position_embeddings, decoder.eos_token_ids) == (256, (2,))
    (part,) = manifest.source.parts
    assert part.location == str(tiny_export)
    listed = {file.path: file.sha256 for file in part.files}
    assert {name: listed[name] for name in listed} == {
        name: digest for name, digest in tree_hashes(tiny_export).items() if name in listed
    }
    assert {"decoder_model_merged.onnx", "config.json", "tokenizer.json"} <= set(listed)
    assert "onnx-ir" in manifest.tools and "torch" not in manifest.tools
    assert [graph.kv_contract for graph in manifest.graphs] == ["none", "none", "concat"]


def test_graphs_are_valid_onnx_with_the_interface_of_a_bundle(tiny_export, patch):
    report = patch(tiny_export, pruner="cls")
    names = {}
    for graph in report.manifest.graphs:
        model = onnx.load(report.bundle / graph.file)
        onnx.checker.check_model(model)
        names[graph.component] = [
            [value.name for value in values] for values in (model.graph.input, model.graph.output)
        ]
    assert names["vision_encoder"] == [["pixel_values"], ["image_features", "keep_indices"]]
    assert names["embed_tokens"] == [["input_ids"], ["inputs_embeds"]]
    assert names["decoder_model_merged"][0][:4] == [
        "inputs_embeds", "attention_mask", "position_ids", "kept_positions",
    ]  # fmt: skip


def test_the_export_stays_as_it_is(own_export, patch):
    before = tree_hashes(own_export)
    patch(own_export, pruner="cls")
    assert tree_hashes(own_export) == before


def test_weights_beside_the_graph_are_brought_along(own_export, patch, images):
    graphs = own_export / "onnx"
    graphs.mkdir()
    for path in own_export.glob("*.onnx"):
        onnx.save(
            onnx.load(path), graphs / path.name, save_as_external_data=True,
            location=f"{path.name}_data", size_threshold=0,
        )  # fmt: skip
        path.unlink()
    report = patch(own_export)
    held = {file.path: file.held for file in report.manifest.files}
    assert held["decoder_model_merged.onnx_data"] != "written"
    copied = patch(own_export, copy_weights=True)
    path = copied.bundle / "decoder_model_merged.onnx_data"
    assert path.stat().st_nlink == 1
    assert compare_with_unpatched(report.bundle, own_export, images, EXPRESSIONS).passed


@pytest.mark.parametrize("keep_ratio", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("pruner", ["cls", "fastervlm"])
def test_scores_select_what_the_package_selects(
    tiny_export, patch, tiny_graphs, pruner, keep_ratio
):
    import torch

    report = patch(tiny_export, pruner=pruner, keep_ratio=keep_ratio)
    session = ort.InferenceSession(report.bundle / "vision_encoder.onnx")
    reference = tiny_graphs.reference(pruner, keep_ratio).component("vision_encoder").module
    random = np.random.default_rng(1)
    for _ in range(20):
        pixels = random.standard_normal((3, 3, 32, 32)).astype(np.float32)
        features, keep = session.run(None, {"pixel_values": pixels})
        with torch.inference_mode():
            wanted, places = reference(torch.from_numpy(pixels))[:2]
        assert np.array_equal(keep, places.numpy())
        assert np.abs(features - wanted.numpy()).max() < 1e-4


def test_patching_needs_neither_torch_nor_transformers(tiny_export, tmp_path):
    blocked = ("torch", "transformers", "safetensors")
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "from gap_export.cli import main\n"
        f"sys.exit(main(['patch', {str(tiny_export)!r}, '--keep', '0.3', '--pruner', 'cls',\n"
        f"               '--out', {str(tmp_path / 'out')!r}, '-q']))\n"
    )
    answer = run_program([sys.executable, "-c", code])
    assert (answer.returncode, answer.stderr) == (0, "")
    assert open_bundle(tmp_path / "out", verify="full").manifest.pruning.pruner == "cls"


def test_a_patched_export_is_refused(tiny_export, own_export, patch):
    bundle = patch(tiny_export).bundle
    with pytest.raises(UsageError, match="this is a bundle, whose graphs are pruned already"):
        patch(bundle)
    for name in ("decoder_model_merged.onnx", "vision_encoder.onnx"):
        shutil.copyfile(tiny_export / name, own_export / name)
        shutil.copyfile(bundle / name, own_export / name)
        with pytest.raises(UsageError, match="already") as caught:
            patch(own_export)
        assert "as its maker left it" in str(caught.value)
        shutil.copyfile(tiny_export / name, own_export / name)


def test_a_folder_of_something_else_is_never_replaced(own_export, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    options = PatchOptions(export=own_export, pruning=KEEP, out=tmp_path / "mine", force=True)
    with pytest.raises(OutputError, match="not only a gap-export bundle"):
        patch_export(options)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="within the export"):
        patch_export(replace(options, out=own_export / "out"))
    assert not (own_export / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruner": "text"}, "allowed: spatial, random, cls, fastervlm"),
        ({"pruner": "nonsense"}, "allowed: spatial, random, cls, fastervlm"),
        ({"keep_ratio": 0.0}, "keep ratio out of range"),
        ({"keep_ratio": float("nan")}, "keep ratio out of range"),
        ({"seed": -1}, "seed out of range"),
        ({"recipe": "llava-1.5-7b"}, "does not fit recipe llava-1.5-7b"),
        ({"variant": "fp16"}, "no vision_encoder that can be patched"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(tiny_export, patch, options, message):
    with pytest.raises(UsageError, match=message):
        patch(tiny_export, **options)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("grid", {"rows": 5, "cols": 5}, r"image_features has not got .*\[images,16,32\]"),
        ("image", {"height": 40, "width": 40}, r"images of another size: \[images,3,32,32\]"),
    ],
)
def test_sizes_are_those_of_the_graph_where_the_config_says_nothing(
    own_export, patch, key, value, message
):
    """Indices of another grid would select something, without an error."""
    config = json.loads((own_export / "config.json").read_text())
    del config["vision_config"]["patch_size"], config["vision_config"]["image_size"]
    (own_export / "config.json").write_text(json.dumps(config))
    patch(own_export)
    recipe = yaml.safe_load((own_export / "recipe.yaml").read_text())
    recipe[key].update(value)
    (own_export / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError, match=message):
        patch(own_export)


@pytest.mark.parametrize("name", ["tokenizer.json", "gap.json", "engines/w"])
def test_weights_under_a_name_that_a_bundle_needs_are_refused(own_export, patch, name):
    folder = own_export / "onnx"
    (folder / name).parent.mkdir(parents=True)
    for path in own_export.glob("*.onnx"):
        path.rename(folder / path.name)
    path = folder / "decoder_model_merged.onnx"
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location=name, size_threshold=0)
    with pytest.raises(UsageError, match="a name that a bundle needs for something else"):
        patch(own_export)


def test_a_patched_bundle_is_measured_beside_its_export_patched_with_all_tokens(tiny_export, patch):
    bundle = patch(tiny_export).bundle
    with pytest.raises(UsageError, match="patch that export once more with --keep 1"):
        evaluate_bundle(bundle, num_samples=4)
    baseline = patch(tiny_export, keep_ratio=1.0).bundle
    rows = evaluate_bundle(bundle, baseline=baseline, num_samples=4).rows
    assert [row.positions for row in rows] == ["none", "compact", "gap"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "the export has no tokenizer"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("tokenizer.json", ("<image>", "<photo>"), "does not know the image token"),
        ("generation_config.json", '{"eos_token_id": 99999999999999999999}',
         r"cannot be patched: decoder.eos_token_ids\[0\]"),
    ],
)  # fmt: skip
def test_nothing_is_left_where_a_file_of_the_export_is_refused(
    own_export, tmp_path, file, content, message
):
    path = own_export / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else path.read_text().replace(*content))
    with pytest.raises(UsageError, match=message):
        patch_export(PatchOptions(export=own_export, pruning=KEEP, out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
