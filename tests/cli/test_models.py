"""``gap-export models``."""

from __future__ import annotations

import shutil
import sys

import pytest

from gap_export.checkpoint.find import hub_cache
from gap_export.spec import recipe
from tests.programs import run_program


@pytest.fixture
def recipes(monkeypatch, tmp_path, tiny_checkpoint):
    """A folder of recipes: one with weights, one whose weights are not there."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_checkpoint / "recipe.yaml", tmp_path / name)
    shutil.copy(tiny_checkpoint / "model.safetensors", tmp_path / "with")
    monkeypatch.setattr(recipe, "models_dir", lambda: tmp_path)


@pytest.fixture
def found(monkeypatch, tmp_path):
    """What the caches hold: put hub ids, or names of files, into it."""
    there = set()

    def find(role, parts):
        part = parts[role]
        names = {repository.id for repository in part.repositories} | {part.file}
        place = tmp_path / "there" if names & there else None
        return hub_cache.PartSearch(role=role, part=part, place=place)

    monkeypatch.setattr(hub_cache, "look_for", find)
    return there


def test_bundled_weights_are_said_to_be_there_or_missing(run_cli, recipes):
    plain = run_cli("models", "--json").plain["models"]
    assert [model["weights"] for model in plain] == ["bundled", "missing"]
    assert plain[0]["grid"] == [4, 4]
    assert plain[0]["parts"] == []


def test_the_table_has_a_row_a_model(run_cli, recipes):
    lines = run_cli("models").out.splitlines()
    assert lines[0].split()[:3] == ["name", "aliases", "family"]
    assert lines[2].split() == ["tiny-llava", "-", "llava", "4x4", "=", "16", "bundled"]
    assert lines[3] == "  random weights, for tests (Apache-2.0)"
    assert len(lines) == 6


def test_optional_parts_are_listed_and_lines_fit_a_wide_terminal(run_cli, found):
    found.add("openai/clip-vit-large-patch14-336")
    lines = run_cli("models").out.splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith("llava-1.5-7b ")]
    assert lines[start + 2] == "  optional: base (missing), tower (here)"
    assert max(map(len, lines)) <= 120


def test_the_demo_model_answers_to_its_aliases(run_cli):
    models = run_cli("models", "--json").plain["models"]
    (demo,) = [model for model in models if model["name"] == "refshapes-llava"]
    assert demo["aliases"] == ["refshapes", "demo"]
    assert demo["num_visual_tokens"] == 144


def weights(run_cli):
    return {item["name"]: item["weights"] for item in run_cli("models", "--json").plain["models"]}


def test_required_parts_that_are_not_here_are_named(run_cli, found):
    assert weights(run_cli)["shikra-7b"] == "missing: main, base, tower"
    found |= {"shikras/shikra-7b-delta-v1-0708", "openai/clip-vit-large-patch14"}
    assert weights(run_cli)["shikra-7b"] == "missing: base"
    found |= {"huggyllama/llama-7b", "llava-hf/llava-1.5-7b-hf"}
    said = weights(run_cli)
    # LLaVA's other parts are optional.
    assert (said["shikra-7b"], said["llava-1.5-7b"]) == ("here", "here")
    assert said["llava-1.5-13b"] == "missing: main"


def test_json_names_each_part_and_where_it_is(run_cli, found, tmp_path):
    found.add("eva_vit_g.pth")
    models = run_cli("models", "--json").plain["models"]
    (minigpt,) = [model for model in models if model["name"] == "minigpt-v2"]
    parts = {part["role"]: part for part in minigpt["parts"]}
    assert parts["base"]["hub"] == "meta-llama/Llama-2-7b-chat-hf"
    assert (parts["base"]["required"], parts["base"]["path"]) == (True, None)
    assert parts["tower"]["path"] == str(tmp_path / "there")
    assert parts["tower"]["hub"] is None
    assert parts["tower"]["url"].endswith("eva_vit_g.pth")
    assert (parts["tower"]["file"], parts["base"]["file"]) == ("eva_vit_g.pth", None)
    (llava,) = [model for model in models if model["name"] == "llava-1.5-7b"]
    also = ["liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.5-7b-lora"]
    assert (llava["parts"][0]["also"], llava["parts"][1]["also"]) == (also, [])


def test_a_download_that_was_cut_short_is_incomplete(run_cli, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--shikras--shikra-7b-delta-v1"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    (snapshot / "config.json").write_text("{}")
    assert weights(run_cli)["shikra-7b"] == "incomplete: main; missing: base, tower"
    (snapshot / "pytorch_model.bin").touch()
    assert weights(run_cli)["shikra-7b"] == "missing: base, tower"


def test_tiles_and_licenses_are_listed(run_cli, found):
    lines = run_cli("models").out.splitlines()
    rows = {line.split()[0]: n for n, line in enumerate(lines) if not line.startswith(" ")}
    assert "24x24 = 576 a tile" in lines[rows["llava-1.6-mistral-7b"]]
    assert "(Apache-2.0)" in lines[rows["llava-1.6-mistral-7b"] + 1]
    assert "32x8 = 256 " in lines[rows["minigpt-v2"]]


def test_listing_models_imports_no_export_package():
    code = (
        "import sys; from gap_export.cli import main; code = main(['models', '-q']);"
        "bad = {'torch', 'transformers', 'onnx', 'numpy', 'safetensors'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else code)"
    )
    done = run_program([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (0, "")
