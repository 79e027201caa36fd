"""Unpruned bundles that an evaluation exported serve the next one."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import ExportError, OutputError
from gap_export.evaluation import kept_baselines
from gap_export.evaluation.kept_baselines import KeptBaselines
from gap_export.exporting import ExportOptions
from gap_export.spec.manifest import QuantizationSpec

OPTIONS = ExportOptions(model="tiny", dtype="float32")


@pytest.fixture
def asked(tiny_bundle, tiny_recipe, tmp_path):
    """Asks for a baseline; ``made`` counts the exports, which copy another bundle."""
    made: list[Path] = []

    def make(out: Path) -> Path:
        made.append(out)
        return shutil.copytree(tiny_bundle, out)

    source = open_bundle(tiny_bundle).manifest.source

    def ask(*, recipe=tiny_recipe, source=source, options=OPTIONS, make=make) -> Path:
        with KeptBaselines(tmp_path / "scratch") as kept:
            return kept.find_or_make(recipe, source, options, "unpruned", make)

    return SimpleNamespace(ask=ask, make=make, made=made, source=source, recipe=tiny_recipe)


def test_a_baseline_is_made_once(asked, cache_folder):
    path = asked.ask()
    assert path.parent == cache_folder / "gap-export" / "baselines"
    assert asked.ask(options=replace(OPTIONS, model="called otherwise")) == path
    assert asked.made == [path]


def test_what_makes_another_bundle_is_another_baseline(asked, monkeypatch):
    part = asked.source.parts[0]
    other_file = replace(part.files[0], sha256="0" * 64)
    quantization = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
    changes = [
        {},
        {"recipe": asked.recipe.model_copy(update={"name": "other"})},
        {"source": replace(asked.source, parts=(replace(part, files=(other_file,)),))},
        {"source": replace(asked.source, random_seed=3)},
        {"options": replace(OPTIONS, dtype="float16")},
        {"options": replace(OPTIONS, quantization=quantization)},
    ]
    paths = {asked.ask(**change) for change in changes}
    monkeypatch.setattr(kept_baselines, "_code_digest", lambda: "another version of the code")
    paths.add(asked.ask())
    monkeypatch.setattr(kept_baselines, "_version", lambda package: f"{package} 99")
    paths.add(asked.ask())
    assert len(paths) == len(asked.made) == len(changes) + 2


def test_where_the_checkpoint_lies_does_not_matter(asked):
    parts = tuple(replace(part, location="/elsewhere") for part in asked.source.parts)
    assert asked.ask() == asked.ask(source=replace(asked.source, parts=parts))


def test_a_damaged_one_is_made_anew(asked):
    path = asked.ask()
    graph = path / "decoder_model_merged.onnx"
    graph.unlink()
    graph.write_bytes(b"damaged")
    assert asked.ask() == path and len(asked.made) == 2
    assert graph.stat().st_size > 100


def test_what_cannot_be_kept_is_made_for_this_time(asked, cache_folder, tmp_path, monkeypatch):
    (cache_folder / "gap-export").mkdir(parents=True, exist_ok=True)
    (cache_folder / "gap-export" / "baselines").write_text("no folder")
    assert asked.ask() == tmp_path / "scratch" / "unpruned"
    shutil.rmtree(tmp_path / "scratch")
    installed = SimpleNamespace(groups={"console_scripts", "gap_export.pruners"})
    monkeypatch.setattr(kept_baselines, "entry_points", lambda: installed)
    assert asked.ask() == tmp_path / "scratch" / "unpruned"


def test_what_cannot_be_exported_is_the_callers_error(asked):
    def fail(out: Path) -> Path:
        raise ExportError("a pass declined")

    with pytest.raises(ExportError, match="a pass declined"):
        asked.ask(make=fail)


def test_another_evaluation_may_be_faster(asked, tiny_bundle):
    def late(out: Path) -> Path:
        shutil.copytree(tiny_bundle, out)
        raise OutputError("the output folder holds a bundle already")

    path = asked.ask(make=late)
    assert asked.ask() == path and not asked.made


def test_what_another_evaluation_uses_stays(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_baselines, "_MAX_BYTES", 0)
    with KeptBaselines(tmp_path / "scratch") as first:
        path = first.find_or_make(asked.recipe, asked.source, OPTIONS, "unpruned", asked.make)
        with KeptBaselines(tmp_path / "other") as second:
            found = second.find_or_make(asked.recipe, asked.source, OPTIONS, "unpruned", asked.make)
            assert found == path
        # The second is done and tidies; so does a third, which finds it damaged.
        assert path.is_dir()
        monkeypatch.setattr(kept_baselines, "_is_whole", lambda path: False)
        with KeptBaselines(tmp_path / "third") as third:
            made = third.find_or_make(asked.recipe, asked.source, OPTIONS, "own", asked.make)
        assert made == tmp_path / "third" / "own" and path.is_dir()
    assert not path.exists()


def test_the_least_used_go_where_there_are_too_many(asked, monkeypatch, tmp_path):
    recipes = [asked.recipe.model_copy(update={"name": name}) for name in ("a", "b", "c")]
    paths = [asked.ask(recipe=recipe) for recipe in recipes]
    for age, path in zip((3, 1, 2), paths, strict=True):
        os.utime(path, (1e9 - age, 1e9 - age))
    kept = KeptBaselines(tmp_path)
    kept.tidy()
    assert all(path.is_dir() for path in paths)
    own = kept_baselines._own_bytes(paths[0])
    monkeypatch.setattr(kept_baselines, "_MAX_BYTES", 2 * own)
    kept.tidy()
    assert [path.is_dir() for path in paths] == [False, True, True]
    asked.ask(recipe=recipes[2])
    monkeypatch.setattr(kept_baselines, "_MAX_BYTES", own)
    kept.tidy()
    assert [path.is_dir() for path in paths] == [False, False, True]
    os.link(next(paths[2].glob("*.onnx")), tmp_path / "linked")
    assert kept_baselines._own_bytes(paths[2]) < own
