"""Pruners of other packages: the example of docs/add-a-pruner.md, and some that misbehave."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import GapExportError, MissingDependencyError, UsageError
from gap_export.exporting import ExportOptions, export_model
from gap_export.families import supported_pruners
from gap_export.pruning import (
    FixedPruner,
    Preset,
    broken_presets,
    check_pruner_installed,
    find_preset,
    presets,
)
from gap_export.runtime.session import GroundingSession
from gap_export.spec.requests import PruningRequest

PAGE = Path(__file__).resolve().parents[2] / "docs/add-a-pruner.md"


def documented_example() -> tuple[str, str]:
    """The module, and the name and value of its entry point."""
    text = PAGE.read_text(encoding="utf-8")
    module = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    entry = re.search(r'"gap_export.pruners"\]\n(.*?)\n```', text, re.DOTALL)
    assert module and entry
    return module[1], entry[1]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package with entry points where Python finds it, as pip would."""

    def put(module: str, entries: str, name: str = "my_pruners") -> None:
        (tmp_path / f"{name}.py").write_text(module)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[gap_export.pruners]\n{entries}\n".replace('"', "")
        )
        presets.OTHER_PRESETS.forget()

    monkeypatch.syspath_prepend(tmp_path)
    presets.OTHER_PRESETS.forget()
    yield put
    presets.OTHER_PRESETS.forget()
    sys.modules.pop("my_pruners", None)


def test_the_documented_pruner_is_exported_and_grounds(
    install, tiny_checkpoint, tiny_recipe, tmp_path
):
    install(*documented_example())
    assert "unusual" in supported_pruners(tiny_recipe)
    options = ExportOptions(
        model=str(tiny_checkpoint),
        pruning=PruningRequest(pruner="unusual", keep_ratio=0.3),
        out=tmp_path / "bundle",
    )
    bundle = export_model(options).bundle
    manifest = open_bundle(bundle).manifest
    assert manifest.pruning.pruner == "unusual"
    assert manifest.tools["pruner: my_pruners"] == "1.0"
    check_pruner_installed("unusual", manifest.tools)
    with pytest.raises(MissingDependencyError, match=r"'lost', is of .*: my_pruners 1\.0; install"):
        check_pruner_installed("lost", manifest.tools)
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    with GroundingSession.open(bundle) as session:
        answer = session.ground(image, "the star")
        scores = np.array(answer.tokens[0].scores)
    best = np.sort(np.argsort(-scores, kind="stable")[:5])
    assert list(answer.keep_indices) == best.tolist()


def test_our_own_names_are_not_taken_over(install):
    install(documented_example()[0], "cls = my_pruners:UNUSUAL")
    assert find_preset("cls") is presets.PRESETS["cls"]
    assert "has a name that is taken" in str(broken_presets()["cls"])


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("lost = no_such_module:X", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("gone = my_pruners:GONE", "cannot be loaded"),
        ("quiet = my_pruners:UNUSUAL", "is not a preset of that name"),
        ("bare = my_pruners:UnusualPruner", "is not a preset of that name"),
    ],
)
def test_an_entry_that_is_none_is_refused_by_name(install, entry, says):
    install(documented_example()[0], entry)
    with pytest.raises(GapExportError) as caught:
        find_preset(entry.split()[0])
    assert says in str(caught.value)


def test_an_unknown_name_lists_the_installed_ones(install):
    install(*documented_example())
    with pytest.raises(UsageError, match=r"unusaul.*litelvlm, unusual.*did you mean unusual"):
        find_preset("unusaul")


def test_a_name_in_capitals_is_understood_and_a_long_one_cut_short():
    with pytest.raises(UsageError, match="did you mean cls"):
        find_preset("CLS")
    with pytest.raises(UsageError, match="pruner fastv is not offered: it ranks inside the LLM"):
        find_preset("FastV")
    with pytest.raises(UsageError) as caught:
        find_preset("x" * 5000)
    assert len(str(caught.value)) < 400


def refusal(pruner: str, checkpoint: Path, out: Path) -> str:
    """What an export by a pruner is refused with; it leaves nothing."""
    pruning = PruningRequest(pruner=pruner, keep_ratio=0.3)
    with pytest.raises(GapExportError) as caught:
        export_model(ExportOptions(model=str(checkpoint), pruning=pruning, out=out))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: np.array([0, 1, 2, 3, 16]), "does not keep what it should: 0..16"),
        (lambda: np.array([0, 1, 2, 3, 3]), "does not keep what it should: 3 more than once"),
        (lambda: np.array([0, 1]), "does not keep what it should: int64 of shape [2]"),
        (lambda: 1 / 0, "raises ZeroDivisionError when it is asked for its places"),
        (lambda: None, "gives no places: a NoneType; allowed: a numpy array"),
        (lambda: np.array([0.5, 1, 2, 3, 4]), "gives no places: a ndarray of float64"),
    ],
)
def test_places_that_are_none_stop_the_export(monkeypatch, tiny_checkpoint, tmp_path, given, says):
    class Places(FixedPruner):
        summary = "for tests"

        def places(self, grid, *, num_kept_tokens, seed):
            return given()

    mine = Preset(name="mine", pruner=Places())
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "mine": mine})
    said = refusal("mine", tiny_checkpoint, tmp_path / "bundle")
    assert said.startswith("pruner mine ") and says in said


CHOOSING = """
import torch
from gap_export.pruning import ChoosingPruner, Preset

class Mine(ChoosingPruner):
    summary = "for tests"

    def choose(self, state, *, num_kept_tokens):
        index = torch.arange(num_kept_tokens, device=state.patch_features.device)
        return (CHOSEN).expand(state.patch_features.shape[0], -1)

MINE = Preset(name="mine", pruner=Mine())
"""


SCORING = """
import torch
from gap_export.pruning import Preset, ScoringPruner

class Mine(ScoringPruner):
    summary = "for tests"

    def scores(self, state):
        loud = state.patch_features.pow(2).sum(dim=-1)
        return SCORES

MINE = Preset(name="mine", pruner=Mine())
"""


@pytest.fixture
def refused(install, tiny_checkpoint, tmp_path):
    """What an export with pruner ``mine`` of a module is refused with."""

    def export(module: str) -> str:
        install(module, "mine = my_pruners:MINE")
        return refusal("mine", tiny_checkpoint, tmp_path / "bundle")

    return export


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ("loud * float('nan')", "gives scores that are no numbers: NaN or infinity"),
        ("loud[:, 1:]", "gives no scores for each row and token: shape [2, 15]"),
        ("loud.numpy()", "gives no scores for each row and token: a ndarray"),
        ("None", "gives no scores for each row and token: a NoneType"),
        ("1 / 0", "raises ZeroDivisionError when it is tried on random tokens: division by zero"),
        (
            "state.cls_features.sum(dim=-1)",
            "only patch_features and what its reads names are given",
        ),
        ("torch.rand_like(loud)", "is not deterministic"),
        ("loud if loud[0, 0] > 0 else -loud", "when it is traced, without values"),
        ("loud[loud > -9].reshape(loud.shape)", "torch.where in place of x[mask]"),
    ],
)
def test_scores_that_are_none_are_refused(refused, scores, says):
    said = refused(SCORING.replace("SCORES", scores))
    assert said.startswith("pruner mine ") and says in said


def test_what_torch_cannot_trace_is_said_in_a_line(refused):
    said = refused(SCORING.replace("SCORES", "loud + torch.arange(16.0)"))
    assert said.startswith("torch cannot export vision_encoder: Tensor on device cpu")
    assert len(said) < 200 and "\n" not in said


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ("index + 14", "does not keep what it should: 14..18"),
        ("index // 2", "does not keep what it should: 0 more than once"),
        ("index.to(torch.int32)", "tokens of another type: torch.int32; allowed: int64"),
        ("torch.cat([index, index[:1] + 9])", "shape [2, 6]; allowed: a tensor [B, 5]"),
    ],
)
def test_chosen_tokens_that_are_none_are_refused(refused, chosen, says):
    assert says in refused(CHOOSING.replace("CHOSEN", chosen))


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ("pruner=Mine(), order='sideways'", "order is not what it may be: 'sideways'"),
        ("pruner=Mine(), extra_token='all'", "extra_token is not what it may be: 'all'"),
        ("pruner=Mine(), budget='free'", "budget is not what it may be: 'free'"),
        ("pruner=Mine(), pruner_text='title'", "pruner_text is not what it may be: 'title'"),
        ("pruner=Mine(), long_texts='sum'", "long_texts is not what it may be: 'sum'"),
        ("pruner=Mine", "has no pruner"),
    ],
)
def test_presets_that_no_manifest_could_hold(refused, preset, says):
    assert says in refused(SCORING.replace("SCORES", "loud").replace("pruner=Mine()", preset))


@pytest.mark.parametrize("says", ["raise ValueError('no')", "def (", "import sys; sys.exit(0)"])
def test_a_package_that_breaks_stops_those_alone_who_ask_for_it(install, tiny_recipe, says):
    install(says, "mine = my_pruners:MINE")
    assert "mine" not in supported_pruners(tiny_recipe)
    assert list(broken_presets()) == ["mine"]
    with pytest.raises(GapExportError, match="pruner mine, which my_pruners:MINE should define"):
        find_preset("mine")
