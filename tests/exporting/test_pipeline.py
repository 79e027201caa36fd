"""The main job: what an export leaves behind, and what it never leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.exporting import (
    ExportOptions,
    ExportReport,
    GraphCache,
    export_checkpoint,
    export_model,
)
from gap_export.progress import Advance
from gap_export.spec.recipe import load_recipe
from tests.shared import sort_options
from tests.shared_traces import share_traces


def options(tiny_checkpoint: Path, out: Path, **changes: object) -> ExportOptions:
    flat = {"model": str(tiny_checkpoint), "pruner": "spatial", "keep_ratio": 0.3, "out": out}
    return ExportOptions(**sort_options(flat | changes))


def test_bundle_holds_what_the_manifest_says_and_nothing_else(tiny_bundle):
    manifest = open_bundle(tiny_bundle, verify="full").manifest
    on_disk = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*")}
    listed = {file.path for file in manifest.files}
    assert on_disk == listed | {"gap.json", "gap.json.sha256"}
    assert {graph.component for graph in manifest.graphs} == {
        "vision_encoder",
        "embed_tokens",
        "decoder_model_merged",
    }
    assert manifest.pruning.num_kept_tokens == 5  # floor(0.3 * 16 + 0.5)
    assert manifest.pruning.num_visual_tokens == 16


def test_graph_signatures_are_those_of_the_design(tiny_text_bundle):
    manifest = open_bundle(tiny_text_bundle).manifest
    names = {
        graph.component: ([t.name for t in graph.inputs], [t.name for t in graph.outputs])
        for graph in manifest.graphs
    }
    assert names["vision_encoder"] == (
        ["pixel_values", "text_embeds"],
        ["image_features", "keep_indices", "token_scores"],
    )
    assert names["text_encoder"] == (["input_ids"], ["text_embeds"])
    assert names["embed_tokens"] == (["input_ids"], ["inputs_embeds"])
    inputs, outputs = names["decoder_model_merged"]
    assert {"inputs_embeds", "attention_mask", "position_ids", "kept_positions"} <= set(inputs)
    assert outputs[0] == "logits"
    for layer in range(manifest.decoder.num_layers):
        for part in ("key", "value"):
            assert f"past_key_values.{layer}.{part}" in inputs
            assert f"present.{layer}.{part}" in outputs


def test_graphs_are_portable(tiny_bundle, tmp_path):
    onnx = pytest.importorskip("onnx")
    # onnx refuses weights that are hard links.
    plain = shutil.copytree(tiny_bundle, tmp_path / "plain")
    for path in plain.glob("*.onnx"):
        if path.name == "decoder_model_merged_ort_fp32.onnx":
            continue  # for ONNX Runtime alone
        model = onnx.load(path, load_external_data=False)
        assert model.ir_version <= 10, path.name
        assert {o.version for o in model.opset_import if o.domain in ("", "ai.onnx")} == {20}
        onnx.checker.check_model(str(path))


def test_decoder_has_one_gap_remap_and_its_table_has_no_default(tiny_bundle):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(tiny_bundle / "decoder_model_merged.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "GapRemap"]
    assert len(nodes) == 1
    assert list(nodes[0].input) == ["position_ids", "kept_positions"]
    assert "kept_positions" not in {t.name for t in model.graph.initializer}


@pytest.fixture(scope="module")
def reports(tiny_checkpoint, tmp_path_factory, shared) -> tuple[ExportReport, ExportReport]:
    """Of an export that finds its cache empty, and of one by another pruner with that cache."""
    out, cache = tmp_path_factory.mktemp("reports"), GraphCache()
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is looked up: the bytes are to be those of a second trace.
        patch.setattr("gap_export.exporting.trace._trace", share_traces(shared))
        first = export_model(options(tiny_checkpoint, out / "spatial"), cache=cache)
    return first, export_model(
        options(tiny_checkpoint, out / "random", pruner="random"), cache=cache
    )


def test_a_second_export_gives_the_same_bytes(reports, tiny_bundle):
    expected = open_bundle(tiny_bundle).manifest
    manifest = reports[0].manifest
    assert (manifest.graphs, manifest.files) == (expected.graphs, expected.files)


def test_graphs_that_do_not_prune_are_traced_once_per_cache(reports, tiny_bundle):
    first, second = reports
    assert "trace decoder_model_merged" in first.seconds
    assert "trace decoder_model_merged" not in second.seconds
    assert "trace vision_encoder" in second.seconds

    def unpruned_parts(manifest):
        graphs = [graph for graph in manifest.graphs if graph.component != "vision_encoder"]
        names = {graph.file for graph in graphs}
        return graphs, [file for file in manifest.files if file.path in names]

    assert unpruned_parts(second.manifest) == unpruned_parts(open_bundle(tiny_bundle).manifest)


def test_report_is_json_and_times_every_step(reports):
    report = reports[1]
    plain = json.loads(json.dumps(report.to_plain()))
    assert plain["num_kept_tokens"] == 5
    assert plain["size_bytes"] == sum(
        p.stat().st_size for p in report.bundle.iterdir() if not p.name.startswith("gap.json")
    )
    assert all(value >= 0 for value in plain["seconds"].values())


def test_a_failing_export_leaves_nothing_behind(tiny_checkpoint, tmp_path, monkeypatch):
    import gap_export.exporting.graphs

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gap_export.exporting.graphs, "save_graph", fail)
    with pytest.raises(KeyboardInterrupt):
        export_model(options(tiny_checkpoint, tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "other"])
def test_a_folder_that_is_no_such_checkpoint_is_refused(tiny_checkpoint, tmp_path, damage):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if damage != "missing":
        shutil.copy(tiny_checkpoint / "recipe.yaml", folder)
    if damage == "other":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError):
        export_model(options(folder, tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("tokenizer.json", {"{": "["}, "damaged or not what it should be"),
        (
            "tokenizer.json",
            {'"object": ': '"it": ', '"unk_token": "<unk>"': '"unk_token": "gone"'},
            "cannot encode",
        ),
        ("tokenizer.json", {"<image>": "<picture>"}, "does not know the image token"),
        ("tokenizer.json", {'"object": ': '"object": 99'}, "ids that the model has not got"),
        ("config.json", {'"image_token_index": 3': '"image_token_index": 4'}, "disagree"),
        # 5 tokens, one of them the image's, and 16 visual tokens: 20 of the 256 places are taken.
        ("recipe.yaml", {"max_new_tokens: 8": "max_new_tokens: 237"}, "context"),
        ("recipe.yaml", {"max_new_tokens: 8": "max_new_tokens: 236"}, None),
    ],
)
def test_a_model_that_cannot_be_asked_is_not_exported(
    tiny_checkpoint, tmp_path, monkeypatch, file, changes, says
):
    import gap_export.exporting.graphs

    def traced(*_: object, **__: object) -> None:
        raise InterruptedError("the prompt passed")

    monkeypatch.setattr(gap_export.exporting.graphs, "trace_component", traced)
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    text = (folder / file).read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError if says else InterruptedError, match=says) as caught:
        export_model(options(folder, tmp_path / "b"))
    if says:
        assert str(folder) in str(caught.value)
    assert not (tmp_path / "b").exists()


class Titles:
    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        self.seen.append(title)
        yield lambda steps: None


def test_a_recipe_and_a_folder_are_exported_as_given_and_progress_names_them(
    tiny_checkpoint, tiny_bundle, tmp_path
):
    recipe = load_recipe(tiny_checkpoint / "recipe.yaml")
    titles = Titles()
    report = export_checkpoint(
        recipe,
        Checkpoint.of(tiny_checkpoint),
        options(tiny_checkpoint, tmp_path / "b", model="not read"),
        progress=titles,
    )
    assert titles.seen == ["exporting spatial 0.3"]
    assert report.manifest.files == open_bundle(tiny_bundle).manifest.files
