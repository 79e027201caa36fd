"""``gap-export models``."""

from __future__ import annotations

import shutil

import pytest

from gap_export import recipe


@pytest.fixture
def recipes(monkeypatch, tmp_path, tiny_checkpoint):
    """A folder of recipes: one with weights, one whose weights are not there."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_checkpoint / "recipe.yaml", tmp_path / name)
    shutil.copy(tiny_checkpoint / "model.safetensors", tmp_path / "with")
    monkeypatch.setattr(recipe, "models_dir", lambda: tmp_path)


def test_weights_are_said_to_be_here_or_missing(run_cli, recipes):
    plain = run_cli("models", "--json").plain["models"]
    assert [model["weights"] for model in plain] == ["here", "missing"]
    assert plain[0]["grid"] == [4, 4]


def test_the_table_has_a_row_a_model(run_cli, recipes):
    lines = run_cli("models").out.splitlines()
    assert lines[0].split()[:3] == ["name", "aliases", "family"]
    assert lines[2].split()[:6] == ["tiny-llava", "-", "llava", "4x4", "=", "16"]
    assert len(lines) == 4


def test_the_demo_model_answers_to_its_aliases(run_cli):
    models = run_cli("models", "--json").plain["models"]
    (demo,) = [model for model in models if model["name"] == "refshapes-llava"]
    assert demo["aliases"] == ["refshapes", "demo"]
    assert demo["num_visual_tokens"] == 144
