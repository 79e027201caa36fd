"""Recipes: every shipped one loads, and a bad one is refused with one clear message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gap_export.errors import RecipeError, UnknownModelError
from gap_export.recipe import find_recipe, list_recipes, load_recipe, models_dir

DEMO = models_dir() / "refshapes-llava" / "recipe.yaml"


def write_recipe(tmp_path: Path, **changes: object) -> Path:
    plain = yaml.safe_load(DEMO.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        target = plain
        for parent in parents:
            target = target[parent]
        target[last] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def test_every_shipped_recipe_is_named_as_its_folder_and_found_by_each_alias():
    recipes = list_recipes()
    assert "refshapes-llava" in [recipe.name for recipe, _ in recipes]
    for recipe, folder in recipes:
        assert recipe.name == folder.name
        for name in (recipe.name, *recipe.aliases):
            assert find_recipe(name)[0] == recipe


def test_names_and_aliases_are_unique():
    names = [n for recipe, _ in list_recipes() for n in (recipe.name, *recipe.aliases)]
    assert len(names) == len(set(names))


def test_unknown_model_suggests_the_nearest_names():
    with pytest.raises(UnknownModelError, match="did you mean refshapes-llava") as caught:
        find_recipe("refshape-lava")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "surprise"),
        ({"image__surprise": 1}, "surprise"),
        ({"grid__rows": "many"}, "grid.rows"),
        ({"defaults__keep_ratio": 0}, "keep_ratio"),
        ({"prompt__template": "USER: <image> ASSISTANT:"}, "{expression}"),
        ({"prompt__template": "<image> <image> {expression}"}, "<image>"),
        ({"prompt__template": "{expression} <image>"}, "after the image"),
        ({"text_tower__similarity_sign": 0}, "similarity_sign"),
        ({"text_tower__template": "a photo"}, "text_tower.template"),
        ({"text_tower__folder": "../clip"}, "text_tower.folder"),
        *(({"name": v}, "name") for v in ("../up", "/tmp/x", "", ".hidden", "a\n", "a" * 200)),
        ({"aliases": ["fine", "a/b"]}, "aliases.1"),
        ({"grid__rows": 0}, "rows must lie in 1..4096"),
        ({"grid__cols": 4097}, "cols must lie in 1..4096"),
        ({"image__height": 0}, "height"),
        ({"image__width": 10**9}, "width"),
        ({"image__pad_color": [0, 256, 0]}, "pad_color must lie in 0..255"),
        ({"image__mean": [0, float("nan"), 0]}, "mean must be finite"),
        ({"image__std": [1, 0, 1]}, "std must be finite and above 0"),
        ({"box__scale": 0}, "scale must be finite and above 0"),
        ({"box__scale": float("inf")}, "scale must be finite and above 0"),
        ({"prompt__max_new_tokens": 0}, "max_new_tokens must lie in 1..100000"),
        ({"prompt__max_expression_tokens": 100_001}, "max_expression_tokens must lie in"),
    ],
)
def test_bad_recipe_names_the_key(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        load_recipe(write_recipe(tmp_path, **changes))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "just text",
        "a: [",
        "!!python/object:os.system {}",
        "a: 2024-13-45",
        "a: !!bool perhaps",
        "a: !!timestamp never",
        pytest.param("a: " + "9" * 5000, id="long number"),
        pytest.param("[" * 5000, id="deep"),
        pytest.param("a" * 60_000 + ": 1", id="long key"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1500


def test_a_file_too_large_for_a_recipe_is_not_parsed(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(DEMO.read_text() + "#" * 65_536)
    with pytest.raises(RecipeError, match="too large"):
        load_recipe(path)


def test_aliases_are_refused_before_they_multiply(tmp_path):
    path = tmp_path / "recipe.yaml"
    laughs = ["a0: &a0 [ha, ha]"]
    laughs += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    path.write_text("\n".join(laughs))
    with pytest.raises(RecipeError, match="aliases"):
        load_recipe(path)


def test_missing_recipe_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")
