from __future__ import annotations

import pytest

from gap_export.errors import ExitCode, RecipeError, UnsupportedPrunerError, UsageError
from gap_export.families import resolve_pruning, supported_pruners
from gap_export.recipe import Recipe
from tests.families.tiny_llava_next import plain_recipe


def resolve(recipe, **changes):
    request = {
        "pruner": "cls", "keep_ratio": 0.3, "order": "raster", "positions": "gap", "seed": 4,
    }  # fmt: skip
    return resolve_pruning(recipe, **(request | changes))


def test_request_is_settled(tiny_recipe):
    pruning = resolve(tiny_recipe)
    assert (pruning.num_visual_tokens, pruning.num_kept_tokens) == (16, 5)
    assert pruning.num_emitted_tokens == 5 and pruning.extra_token == "none"
    assert pruning.seed is None and pruning.text_similarity_sign is None


def test_only_pruners_that_use_them_carry_seed_and_sign(tiny_recipe):
    assert resolve(tiny_recipe, pruner="random").seed == 4
    assert resolve(tiny_recipe, pruner="text").text_similarity_sign == 1


def test_recipe_gives_what_is_not_asked_for(tiny_recipe):
    pruning = resolve(tiny_recipe, pruner=None, keep_ratio=None)
    assert (pruning.pruner, pruning.keep_ratio) == ("spatial", 0.3)


def test_model_without_text_tower_refuses_text_and_names_the_others(tiny_recipe):
    recipe = tiny_recipe.model_copy(update={"text_tower": None})
    assert supported_pruners(tiny_recipe) == ("cls", "text", "random", "spatial", "fastervlm")
    assert supported_pruners(recipe) == ("cls", "random", "spatial", "fastervlm")
    with pytest.raises(
        UnsupportedPrunerError, match=r"text.*allowed: cls, random, spatial, fastervlm"
    ) as caught:
        resolve(recipe, pruner="text")
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pruner": "clip"}, "no pruner of that name: clip"),
        ({"keep_ratio": 0.0}, "keep ratio out of range"),
        ({"keep_ratio": 1.01}, "keep ratio out of range"),
        ({"keep_ratio": float("nan")}, "keep ratio out of range"),
        ({"seed": -1, "pruner": "random"}, "seed out of range"),
        ({"seed": 2**63, "pruner": "random"}, "allowed: 0..9223372036854775807"),
        ({"pruner": "spatial", "order": "score"}, "allowed: raster"),
    ],
)
def test_unusable_request_is_refused(tiny_recipe, changes, says):
    with pytest.raises(UsageError) as caught:
        resolve(tiny_recipe, **changes)
    assert says in str(caught.value)


def test_tiles_are_pruned_each_by_its_own_number():
    pruning = resolve(Recipe.model_validate(plain_recipe()))
    assert (pruning.num_visual_tokens, pruning.num_kept_tokens) == (16, 5)


@pytest.mark.parametrize("pruner", ["cls", "random", "fastervlm"])
def test_tiles_are_joined_in_raster_order_alone(pruner):
    with pytest.raises(UsageError, match=r"tiny-next.*tiles.*order score; allowed: raster"):
        resolve(Recipe.model_validate(plain_recipe()), pruner=pruner, order="score")


@pytest.mark.parametrize(("name", "text_tower"), [("spatail", True), ("text", False)])
def test_a_bad_default_is_the_recipes_mistake(tiny_recipe, name, text_tower):
    defaults = tiny_recipe.defaults.model_copy(update={"pruner": name})
    tower = tiny_recipe.text_tower if text_tower else None
    recipe = tiny_recipe.model_copy(update={"defaults": defaults, "text_tower": tower})
    with pytest.raises(RecipeError, match=r"recipe tiny-llava: defaults\.pruner.*allowed: cls"):
        resolve(recipe, pruner=None)
    assert resolve(recipe, pruner="cls").pruner == "cls"
