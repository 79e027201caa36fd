from __future__ import annotations

import dataclasses
import re

import pytest

from gap_export.errors import ExitCode, RecipeError, UnsupportedPrunerError, UsageError
from gap_export.families import resolve_pruning, supported_pruners
from gap_export.pruning import PRESETS
from gap_export.spec.manifest import GridSpec
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest
from tests.families.tiny_llava_next import plain_recipe


def resolve(recipe, **changes):
    request = {
        "pruner": "cls", "keep_ratio": 0.3, "order": "raster", "positions": "gap", "seed": 4,
    }  # fmt: skip
    return resolve_pruning(recipe, PruningRequest(**(request | changes)))


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
    assert supported_pruners(tiny_recipe) == tuple(PRESETS)
    reading = {name for name, preset in PRESETS.items() if "text" in preset.pruner.reads}
    assert reading == {"text", "trim", "cdpruner", "litelvlm"}
    assert set(supported_pruners(recipe)) == set(PRESETS) - reading
    with pytest.raises(
        UnsupportedPrunerError, match=r"text.*allowed: cls, random, spatial, prumerge"
    ) as caught:
        resolve(recipe, pruner="text")
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pruner": "clip"}, "no pruner of that name: clip"),
        ({"pruner": "fastv"}, "fastv is not offered: it ranks inside the LLM"),
        ({"keep_ratio": 0.0}, "keep ratio out of range"),
        ({"keep_ratio": 1.01}, "keep ratio out of range"),
        ({"keep_ratio": float("nan")}, "keep ratio out of range"),
        ({"seed": -1, "pruner": "random"}, "seed out of range"),
        ({"seed": 2**63, "pruner": "random"}, "allowed: 0..9223372036854775807"),
        ({"pruner": "spatial", "order": "score"}, "allowed: raster"),
        ({"pruner": "random", "extra_token": "weighted"}, "no such extra token: weighted"),
        ({"pruner": "divprune", "extra_token": "weighted"}, "allowed: none, mean"),
        ({"pruner": "cls", "budget": "adaptive"}, "no such budget: adaptive; allowed: fixed"),
        ({"pruner": "cls", "pruner_text": "expression"}, "cls reads no text"),
        ({"pruner": "trim", "pruner_text": "title"}, "title; allowed: expression, question"),
        (
            {"pruner": "spatial", "extra_position": "last"},
            "no extra token that could have a position: last",
        ),
        (
            {"pruner": "prumerge", "extra_token": "none", "extra_position": "last"},
            "no extra token that could have a position: last",
        ),
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


def test_a_preset_is_its_published_choices_unless_others_are_asked_for(tiny_recipe):
    plain = resolve(tiny_recipe, pruner="prumerge", order=None)
    assert (plain.order, plain.extra_token, plain.budget) == ("score", "weighted", "fixed")
    assert (plain.num_kept_tokens, plain.num_emitted_tokens) == (5, 6)
    other = resolve(
        tiny_recipe, pruner="prumerge", order="raster", extra_token="none", keep_ratio=1.0
    )
    assert (other.order, other.extra_token, other.num_emitted_tokens) == ("raster", "none", 16)


def test_without_a_share_an_adaptive_method_is_adaptive(tiny_recipe):
    found = resolve(tiny_recipe, pruner="trim", order=None, keep_ratio=None)
    assert (found.budget, found.keep_ratio, found.num_kept_tokens) == ("adaptive", 1.0, 15)
    assert found.kept_buckets == () and found.num_emitted_tokens == 16
    capped = resolve(tiny_recipe, pruner="trim", keep_ratio=0.3, budget="adaptive")
    assert capped.num_kept_tokens == 5
    assert resolve(tiny_recipe, pruner="cls", keep_ratio=None).budget == "fixed"


def test_all_tokens_leave_nothing_for_an_extra_one(tiny_recipe):
    found = resolve(tiny_recipe, pruner="trim", keep_ratio=1.0)
    assert (found.extra_token, found.num_emitted_tokens) == ("none", 16)


def test_more_tokens_than_topk_takes_are_refused_where_they_are_ranked(tiny_recipe):
    wide = GridSpec(rows=62, cols=62)
    recipe = tiny_recipe.model_copy(update={"grid": wide})
    with pytest.raises(UsageError, match=r"so many visual tokens: 3844; allowed: 3840 at most"):
        resolve(recipe)
    assert resolve(recipe, pruner="spatial").num_kept_tokens == 1153
    resolve(tiny_recipe.model_copy(update={"grid": GridSpec(rows=60, cols=64)}))


@pytest.mark.parametrize(
    "changes", [{"extra_token": "mean"}, {"budget": "adaptive", "pruner": "prumerge"}]
)
def test_tiles_take_no_extra_token_and_no_number_of_their_own(changes):
    with pytest.raises(UsageError, match=r"cuts its images into tiles"):
        resolve(Recipe.model_validate(plain_recipe()), order="raster", **changes)


def test_tiles_take_of_a_preset_what_fits_them():
    pruning = resolve(Recipe.model_validate(plain_recipe()), pruner="prumerge", order=None)
    assert (pruning.order, pruning.extra_token, pruning.budget) == ("raster", "none", "fixed")


def test_a_tower_without_a_layer_behind_the_select_layer_has_no_prumerge(tiny_recipe):
    recipe = tiny_recipe.model_copy(update={"select_layer": -1})
    with pytest.raises(UnsupportedPrunerError, match=r"prumerge.*lacks: next_layer"):
        resolve(recipe, pruner="prumerge", order=None)
    assert resolve(recipe, pruner="visionzip", order=None).pruner == "visionzip"


def test_a_position_is_for_an_extra_token_alone(tiny_recipe):
    placed = resolve(tiny_recipe, pruner="prumerge", order=None, extra_position="centroid")
    assert placed.extra_position == "centroid"
    assert resolve(tiny_recipe, pruner="prumerge", order=None).extra_position == "last"
    # Nothing is dropped that it could stand for; of all shares that are measured one may be 1.
    assert (
        resolve(tiny_recipe, pruner="trim", keep_ratio=1.0, extra_position="last").keep_ratio == 1
    )


@pytest.mark.parametrize(
    ("pruner", "asked", "reads"),
    [
        # As the authors of each have it.
        ("text", None, "expression"),
        ("trim", None, "question"),
        ("cdpruner", None, "question"),
        ("text", "question", "question"),
        ("trim", "expression", "expression"),
        ("cdpruner", "expression", "expression"),
        ("spatial", None, "expression"),
    ],
)
def test_what_is_read_of_the_text_is_the_authors_choice_or_ones_own(
    tiny_recipe, pruner, asked, reads
):
    assert resolve(tiny_recipe, pruner=pruner, pruner_text=asked).pruner_text == reads


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pruner": "trim"}, "or use --pruner-text expression"),
        ({"pruner": "text", "pruner_text": "question"}, "prompt.question missing"),
    ],
)
def test_a_question_that_the_recipe_does_not_mark_is_refused(tiny_recipe, changes, says):
    prompt = dataclasses.replace(tiny_recipe.prompt, question=None)
    recipe = tiny_recipe.model_copy(update={"prompt": prompt})
    with pytest.raises(UsageError, match=re.escape(says)):
        resolve(recipe, **changes)
    assert resolve(recipe, pruner="trim", pruner_text="expression").pruner == "trim"
