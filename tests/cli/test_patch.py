"""``gap-export patch``: a bundle from somebody else's graphs, or one message that says why not."""

from __future__ import annotations

import numpy as np
import onnx
from PIL import Image

from tests.patching.conftest import *  # noqa: F403 - its fixtures


def test_a_patched_export_can_be_asked_and_inspected(run_cli, tiny_export, tmp_path):
    out = tmp_path / "bundle"
    answer = run_cli("patch", tiny_export, "--keep", "0.3", "--out", out)
    assert (answer.code, answer.out.strip()) == (0, str(out))
    assert "tiny-llava: 5 of 16 visual tokens (spatial, gap positions), float32" in answer.err
    assert "GapRemap feeds 2 nodes of RoPE: Cos " in answer.err
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(image)
    answer = run_cli("ground", out, image, "the red circle")
    assert answer.code == 0
    assert len(answer.plain["keep_indices"]) == 5
    answer = run_cli("inspect", out)
    assert answer.code == 0
    assert "GapRemap in decoder_model_merged.onnx" in answer.out
    assert "patched from an ONNX export" in answer.out


def test_json_says_what_was_done(run_cli, tiny_export, tmp_path):
    options = ["--pruner", "random", "--seed", 3, "--positions", "compact", "--json", "-q"]
    answer = run_cli("patch", tiny_export, "--keep", "0.5", "--out", tmp_path / "b", *options)
    assert (answer.code, answer.err) == (0, "")
    plain = answer.plain
    assert (plain["pruner"], plain["positions"], plain["num_kept_tokens"]) == (
        "random", "compact", 8,
    )  # fmt: skip
    assert len(plain["rotary"]) == 2 and plain["warnings"] == []


def test_the_recipe_says_how_many_tokens_stay(run_cli, tiny_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run_cli("patch", tiny_export, "--pruner", "cls")
    assert answer.out.strip() == "tiny-llava-cls-0.3"


def test_a_graph_without_position_ids_is_exit_code_2_and_says_what_was_looked_for(
    run_cli, own_export, tmp_path
):
    path = own_export / "decoder_model_merged.onnx"
    model = onnx.load(path)
    for value in model.graph.input:
        if value.name == "position_ids":
            value.name = "cache_position"
    for node in model.graph.node:
        node.input[:] = ["cache_position" if n == "position_ids" else n for n in node.input]
    onnx.save(model, path)
    answer = run_cli("patch", own_export, "--keep", "0.3", "--out", tmp_path / "out")
    assert (answer.code, answer.out) == (2, "")
    assert f"{path} cannot be patched: the decoder has no input called position_ids" in answer.err
    assert "inputs inputs_embeds, attention_mask, cache_position" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_there_is_replaced_by_force_alone(run_cli, tiny_export, tmp_path):
    arguments = ["patch", tiny_export, "--keep", "0.3", "--out", tmp_path / "out"]
    assert run_cli(*arguments).code == 0
    answer = run_cli(*arguments)
    assert answer.code == 2 and "--force" in answer.err
    assert run_cli(*arguments, "--force").code == 0


def test_missing_packages_are_named_with_the_extra(run_cli, tiny_export, monkeypatch):
    from gap_export import extras

    monkeypatch.setattr(extras, "_is_installed", lambda name: name != "onnxscript")
    answer = run_cli("patch", tiny_export)
    assert answer.code == 2
    assert "onnxscript" in answer.err and extras.pip_install("patch") in answer.err
