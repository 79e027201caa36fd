"""``gap-export pruners``."""

from __future__ import annotations

import pytest
import yaml

from gap_export.errors import GapExportError
from gap_export.pruning import LEFT_OUT, PRESETS, presets
from gap_export.spec.recipe import models_dir


@pytest.fixture
def one_is_broken(monkeypatch):
    error = GapExportError("pruner lost, which lost:X should define, cannot be loaded")
    monkeypatch.setitem(presets.OTHER_PRESETS.found, "lost", error)


def test_the_list_is_json_for_programs(run_cli):
    outcome = run_cli("pruners", "--json", "--model", "refshapes-minigpt-v2")
    assert outcome.code == 0
    served = {each["name"]: each["served"] for each in outcome.plain["pruners"]}
    assert list(served) == list(PRESETS)
    assert (served["spatial"], served["text"]) == (True, False)
    assert outcome.plain["left_out"] == dict(LEFT_OUT)
    assert outcome.plain["broken"] == {}


def test_a_broken_pruner_is_a_warning_and_the_others_are_listed(run_cli, one_is_broken):
    outcome = run_cli("pruners")
    assert outcome.code == 0
    assert "warning: pruner lost, which lost:X should define, cannot be loaded" in outcome.err
    assert all(name in outcome.out for name in PRESETS)
    assert list(run_cli("pruners", "--json").plain["broken"]) == ["lost"]


def test_a_checkpoint_folder_is_a_model_too(run_cli, tmp_path):
    plain = yaml.safe_load((models_dir() / "qwen3-vl-4b" / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**plain, "name": "mine"}))
    outcome = run_cli("pruners", "--json", "--model", str(tmp_path))
    assert outcome.code == 0
    served = {each["name"]: each["served"] for each in outcome.plain["pruners"]}
    assert served["text-llm"] and not served["fastervlm"]
