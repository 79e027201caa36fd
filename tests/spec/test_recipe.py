"""Recipes: every shipped one loads, and a bad one is refused with one clear message."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml

from gap_export.errors import RecipeError, UnknownModelError
from gap_export.spec.recipe import find_recipe, list_recipes, load_recipe, models_dir
from gap_export.spec.requests import PruningRequest

DEMO, INTERNVL, LLAVA, MINIGPT, NEXT, SHIKRA = (
    models_dir() / name / "recipe.yaml"
    for name in (
        "refshapes-llava",
        "internvl3-1b",
        "llava-1.5-7b",
        "minigpt-v2",
        "llava-1.6-mistral-7b",
        "shikra-7b",
    )
)
PAPER_MODELS = (
    "llava-1.5-13b",
    "llava-1.5-7b",
    "llava-1.6-mistral-7b",
    "llava-1.6-vicuna-7b",
    "minigpt-v2",
    "shikra-7b",
)
QWEN_MODELS = (
    "qwen2-vl-2b",
    "qwen2-vl-7b",
    "qwen2.5-vl-3b",
    "qwen2.5-vl-7b",
    "qwen3-vl-2b",
    "qwen3-vl-4b",
    "qwen3-vl-8b",
)
# By name, parameters as counted from config.json; of the 8B of 3.5 half its published bytes.
INTERNVL_MODELS = {
    "internvl3-1b": 938_193_024,
    "internvl3-2b": 2_088_957_440,
    "internvl3-8b": 7_944_373_760,
    "internvl3.5-1b": 1_060_897_792,
    "internvl3.5-2b": 2_348_347_392,
    "internvl3.5-4b": 4_732_489_216,
    "internvl3.5-8b": 17_056_636_928 // 2,
}
DEMO_MODELS = (
    "refshapes-internvl",
    "refshapes-llava",
    "refshapes-minigpt-v2",
    "refshapes-qwen3-vl",
    "refshapes-shikra",
)


def write_recipe(tmp_path: Path, source: Path = DEMO, /, **changes: object) -> Path:
    plain = yaml.safe_load(source.read_text())
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


def test_every_model_of_the_paper_has_a_recipe():
    shipped = {recipe.name: recipe for recipe, _ in list_recipes()}
    assert {*PAPER_MODELS, *DEMO_MODELS} <= set(shipped)
    assert find_recipe("llava")[0].name == "llava-1.5-7b"
    for name in PAPER_MODELS:
        recipe = shipped[name]
        assert recipe.checkpoint.kind == "local"
        assert recipe.architecture is not None
        assert recipe.prompt.tokenization == "segments"
        # A default that asks for a part which may be missing would fail at the first try.
        assert recipe.defaults.pruner == "fastervlm"


@pytest.mark.parametrize(
    ("name", "decoder", "tower", "projector"),
    [
        # Published counts: Llama 6,738,415,616 and 13,015,864,320; Mistral 7,241,732,096; of
        # CLIP's vision halves 303,507,456 and 303,179,776. llava-hf adds 64 rows to vocabulary
        # and head, Shikra 3.
        ("llava-1.5-7b", 6_738_415_616 + 2 * 64 * 4096, 303_507_456, 20_979_712),
        ("llava-1.5-13b", 13_015_864_320 + 2 * 64 * 5120, 303_507_456, 31_467_520),
        ("llava-1.6-vicuna-7b", 6_738_415_616 + 2 * 64 * 4096, 303_507_456, 20_979_712),
        ("llava-1.6-mistral-7b", 7_241_732_096 + 2 * 64 * 4096, 303_507_456, 20_979_712),
        ("shikra-7b", 6_738_415_616 + 2 * 3 * 4096, 303_179_776, 4_198_400),
        # The published file's size says 23.07 M for the projector.
        ("minigpt-v2", 6_738_415_616, None, 23_072_768),
    ],
)
def test_sizes_are_those_of_the_published_models(name, decoder, tower, projector):
    from gap_export.families import find_family, load_builder

    recipe = find_recipe(name)[0]
    assert recipe.architecture is not None
    counts = dict.fromkeys(("decoder", "tower", "projector"), 0)
    for key, shape in (
        load_builder(find_family(recipe)).expected_tensors(recipe.architecture).items()
    ):
        part = key.partition(".")[0].replace("lm_head", "decoder")
        counts[part] = counts.get(part, 0) + math.prod(shape)
    assert (counts["decoder"], counts["projector"]) == (decoder, projector)
    assert tower is None or counts["tower"] == tower


@pytest.mark.parametrize("name", INTERNVL_MODELS)
def test_internvl_s_recipes_are_of_the_published_sizes_tokens_and_canvases(name):
    from gap_export.families import find_family, load_builder

    recipe = find_recipe(name)[0]
    assert recipe.architecture is not None and recipe.image.tiles is not None
    tensors = load_builder(find_family(recipe)).expected_tensors(recipe.architecture)
    assert sum(map(math.prod, tensors.values())) == INTERNVL_MODELS[name]
    assert "lm_head.weight" in tensors and not recipe.architecture.decoder.tied_embeddings
    is_newer = name.startswith("internvl3.5")
    assert recipe.architecture.decoder.qk_norm is is_newer
    assert recipe.special_tokens["<IMG_CONTEXT>"] == (151671 if is_newer else 151667)
    assert recipe.special_tokens["<|im_end|>"] == 151645
    assert recipe.end_of_answer == ("<|im_end|>",)
    tiles = [height * width // 448**2 for height, width in recipe.image.tiles.resolutions]
    assert len(tiles) == 14 and tiles == sorted(tiles) and tiles[-1] == 6
    # Of one shape, which two are equally near, the smaller stands first.
    assert recipe.image.tiles.resolutions.index((448, 448)) == 0
    template = recipe.prompt.template
    assert template.startswith("<|im_start|>system\n你是书生·万象")
    assert template.endswith("<ref>{expression}</ref><|im_end|>\n<|im_start|>assistant\n")
    assert "模型。<|im_end|>\n<|im_start|>user\n<img><IMG_CONTEXT></img>\nPlease" in template
    assert recipe.defaults.pruner == "divprune"


def test_a_recipe_says_in_what_it_differs_from_its_base(tmp_path):
    base = find_recipe("internvl3-1b")[0]
    plain = {
        "base": "internvl3-1b",
        "name": "mine",
        "summary": "for tests",
        "license": "MIT",
        "checkpoint": {"kind": "bundled"},
        "prompt": {"max_new_tokens": 7},
        "end_of_answer": ["<|endoftext|>"],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    found = load_recipe(path)
    assert (found.name, found.aliases, found.published) == ("mine", (), ())
    assert found.end_of_answer == ("<|endoftext|>",)
    assert found.prompt == dataclasses.replace(base.prompt, max_new_tokens=7)
    assert (found.architecture, found.image) == (base.architecture, base.image)


def test_the_recipe_of_the_page_on_models_has_one_tile(tmp_path):
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    text = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.image.preparation, recipe.image.tiles) == ("squash", None)
    assert recipe.grid.num_visual_tokens == 256


@pytest.mark.parametrize("name", ["internvl3-2b", "no-such", "../llava-1.5-7b", 7, ["llava"], None])
def test_a_base_that_is_none_is_refused(tmp_path, name):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": name, "name": "mine"}))
    with pytest.raises(RecipeError, match=r"base cannot be used.*has no base itself: ") as caught:
        load_recipe(path)
    assert "internvl3-1b" in str(caught.value)
    assert "internvl3-8b" not in str(caught.value), "it has a base itself"


@pytest.mark.parametrize("missing", ["name", "summary", "license", "checkpoint"])
def test_what_a_model_is_called_and_where_it_comes_from_is_never_the_base_s(tmp_path, missing):
    plain = yaml.safe_load((models_dir() / "internvl3-2b" / "recipe.yaml").read_text())
    del plain[missing]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(RecipeError, match=f"at {missing}.*Field required"):
        load_recipe(path)


@pytest.mark.parametrize("name", [*PAPER_MODELS, *QWEN_MODELS, *INTERNVL_MODELS])
def test_every_pruner_a_model_claims_can_be_asked_for(name):
    from gap_export.families import resolve_pruning, supported_pruners

    recipe = find_recipe(name)[0]
    for pruner in (None, *supported_pruners(recipe)):
        pruning = resolve_pruning(
            recipe,
            PruningRequest(pruner=pruner, keep_ratio=None, order="raster"),
        )
        assert pruning.num_visual_tokens == recipe.grid.num_visual_tokens
    assert ("text" in supported_pruners(recipe)) == (recipe.text_tower is not None)


def test_prompts_are_exactly_those_the_models_were_trained_with():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
    )
    ask = (
        "<image>\nPlease provide the bounding box coordinate of the region this sentence "
        "describes: {expression}"
    )
    wanted = {
        "llava-1.5-7b": f"{system}{ask} ASSISTANT:",
        "llava-1.5-13b": f"{system}{ask} ASSISTANT:",
        "llava-1.6-vicuna-7b": f"{system}{ask} ASSISTANT:",
        "llava-1.6-mistral-7b": f"[INST] {ask} [/INST]",
        "shikra-7b": f"{system}Can you point out {{expression}} in the image<im_start><image>"
        "<im_end>and provide the coordinates of its location? ASSISTANT:",
        "minigpt-v2": "<s>[INST] <Img><ImageHere></Img> [refer] give me the location of "
        "{expression} [/INST]",
    }
    found = {name: find_recipe(name)[0].prompt.template for name in PAPER_MODELS}
    assert found == wanted


def test_prompts_of_qwen_s_models_are_chat_templates_around_their_authors_questions():
    turn = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    third = (
        f'{turn}Locate every object that matches the description "{{expression}}" in the image. '
        f"Report bbox coordinates in JSON format.{answer}"
    )
    second = (
        f"{system}{turn}Locate {{expression}} in this image and output the bbox coordinates in "
        f"JSON format.{answer}"
    )
    first = f"{system}{turn}Find <|object_ref_start|>{{expression}}<|object_ref_end|>{answer}"
    for name in QWEN_MODELS:
        recipe = find_recipe(name)[0]
        wanted = {"qwen3_vl": third, "qwen2_5_vl": second, "qwen2_vl": first}[recipe.family]
        assert recipe.prompt.template == wanted
        assert recipe.prompt.tokenization == "whole"
        # There is no CLS to read.
        assert recipe.defaults.pruner == "divprune"


def test_only_one_of_qwen_s_models_may_not_be_used_commercially():
    notes = {name: find_recipe(name)[0].license_note for name in QWEN_MODELS}
    assert [name for name, note in notes.items() if note] == ["qwen2.5-vl-3b"]
    assert "no commercial use" in str(notes["qwen2.5-vl-3b"])


def test_the_question_is_what_trim_and_cdpruner_are_fed():
    """The user's message alone, its image left out, as their authors' scripts take it."""
    ask = "Please provide the bounding box coordinate of the region this sentence describes: "
    wanted = {
        "llava-1.5-7b": f"{ask}{{expression}}",
        "llava-1.5-13b": f"{ask}{{expression}}",
        "llava-1.6-vicuna-7b": f"{ask}{{expression}}",
        "llava-1.6-mistral-7b": f"{ask}{{expression}}",
        "shikra-7b": "Can you point out {expression} in the image and provide the coordinates of "
        "its location?",
        "refshapes-llava": "{expression}",
    }
    assert {name: find_recipe(name)[0].prompt.question_template() for name in wanted} == wanted


def test_names_and_aliases_are_unique():
    names = [n for recipe, _ in list_recipes() for n in (recipe.name, *recipe.aliases)]
    assert len(names) == len(set(names))


def test_unknown_model_suggests_the_nearest_names():
    with pytest.raises(UnknownModelError, match="did you mean refshapes-llava") as caught:
        find_recipe("refshape-lava")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        (DEMO, {"surprise": 1}, "surprise"),
        (DEMO, {"image__surprise": 1}, "surprise"),
        (DEMO, {"grid__rows": "many"}, "grid.rows"),
        (DEMO, {"defaults__keep_ratio": 0}, "keep_ratio"),
        (DEMO, {"prompt__template": "USER: <image> ASSISTANT:"}, "{expression}"),
        (DEMO, {"prompt__template": "<image> <image> {expression}"}, "<image>"),
        (DEMO, {"prompt__template": "{expression} <image>"}, "after the image"),
        (DEMO, {"prompt__template": "A <image> {expression} B"}, "prompt.question must be"),
        (DEMO, {"prompt__template": "<image> {expression} \ud800"}, "surrogate"),
        (DEMO, {"prompt__image_token": "expression"}, "must not be part of"),
        (DEMO, {"prompt__image_token": "{expression}"}, "must not be part of"),
        (DEMO, {"text_tower__similarity_sign": 0}, "similarity_sign"),
        (DEMO, {"text_tower__template": "a photo"}, "text_tower.template"),
        (DEMO, {"text_tower__folder": "../clip"}, "text_tower.folder"),
        *(
            (DEMO, {"name": name}, "name")
            for name in ("../up", "/tmp/x", "", ".hidden", "a\n", "a" * 200)
        ),
        (DEMO, {"aliases": ["fine", "a/b"]}, "aliases.1"),
        (DEMO, {"grid__rows": 0}, "grid.rows must be 1..4096"),
        (DEMO, {"grid__cols": 4097}, "grid.cols must be 1..4096"),
        (DEMO, {"image__height": 0}, "height"),
        (DEMO, {"image__width": 10**9}, "width"),
        (DEMO, {"image__pad_color": [0, 256, 0]}, "image.pad_color must be 0..255"),
        (DEMO, {"image__mean": [0, float("nan"), 0]}, "image.mean must be finite"),
        (DEMO, {"image__std": [1, 0, 1]}, "image.std must be a finite number above 0"),
        (DEMO, {"box__scale": 0}, "box.scale must be a finite number above 0"),
        (DEMO, {"box__scale": float("inf")}, "box.scale must be a finite number above 0"),
        (DEMO, {"prompt__max_new_tokens": 0}, "max_new_tokens must be 1..100000"),
        (DEMO, {"prompt__max_expression_tokens": 100_001}, "max_expression_tokens must be 1.."),
        (LLAVA, {"grid__cols": 23}, "grid must be 24 rows, 24 cols"),
        (MINIGPT, {"grid": {"rows": 16, "cols": 16}}, "grid must be 32 rows, 8 cols"),
        (MINIGPT, {"architecture__projector__width": 1408 * 5}, "grid must be"),
        (LLAVA, {"image__height": 224}, "image must be 336 px"),
        (LLAVA, {"architecture__projector__width": 1000}, "must go from vision.width"),
        (LLAVA, {"architecture__projector__hidden_size": 5120}, "must go from vision.width"),
        (LLAVA, {"architecture__decoder__num_key_value_heads": 5}, "heads must divide"),
        (LLAVA, {"architecture__vision__num_heads": 0}, "vision.num_heads must lie in"),
        (LLAVA, {"architecture__vision__patch_size": 0}, "vision.patch_size must lie in"),
        (LLAVA, {"architecture__decoder__surprise": 1}, "surprise"),
        (LLAVA, {"architecture__decoder__num_layers": 1001}, "num_layers must lie in 1..1000"),
        (LLAVA, {"architecture__decoder__vocab_size": 10**9}, "vocab_size must lie in"),
        (LLAVA, {"architecture__decoder__intermediate_size": 10**9}, "intermediate_size must lie"),
        (
            LLAVA,
            {
                "architecture__decoder__num_layers": 999,
                "architecture__decoder__intermediate_size": 10**6,
            },
            "weights of architecture.decoder's layers",
        ),
        (LLAVA, {"image__height": 16_384, "image__width": 16_384}, "pixels of image.height"),
        (LLAVA, {"grid__rows": 4096, "grid__cols": 4096}, "tokens of grid.rows"),
        (LLAVA, {"architecture__vision__width": "wide"}, "architecture.vision.width"),
        (LLAVA, {"checkpoint__parts__tower__surprise": 1}, "surprise"),
        (LLAVA, {"checkpoint__parts": {}}, "main"),
        (LLAVA, {"checkpoint__kind": "bundled"}, "kind is local"),
        (LLAVA, {"checkpoint__parts__main__hub__id": "no-owner"}, "main.hub.id"),
        (LLAVA, {"checkpoint__parts__main__hub__id": "../../etc"}, "main.hub.id"),
        (MINIGPT, {"checkpoint__parts__main__file": "../x.pth"}, "main.file"),
        (MINIGPT, {"checkpoint__parts__main__hub__kind": "dataset"}, "main.hub.kind"),
        (LLAVA, {"text_tower__role": "clip"}, "text_tower.role must be one of base, main, tower"),
        (LLAVA, {"end_of_answer": ["<end>"]}, "end_of_answer must name special_tokens"),
        (SHIKRA, {"special_tokens": {"</s>": -1}}, "special_tokens of '</s>'"),
        (NEXT, {"image__tiles": None}, "image.tiles must be there with preparation anyres"),
        (NEXT, {"image__preparation": "pad"}, "image.tiles must be there with preparation anyres"),
        (NEXT, {"image__tiles__resolutions": [[336, 500]]}, "multiples of the tile"),
        (NEXT, {"image__tiles__resolutions": [[0, 336]]}, "multiples of the tile"),
        (NEXT, {"image__tiles__resolutions": [[336]]}, "image.tiles.resolutions"),
        (
            INTERNVL,
            {"image__tiles__resolutions": [[896, 448], [448, 448]]},
            "smaller canvases before larger ones",
        ),
        (INTERNVL, {"image__preparation": "squash"}, "anyres or dynamic_tiles, and only there"),
        (INTERNVL, {"image__preparation": "cut"}, "pad, squash, anyres, dynamic_tiles"),
        (LLAVA, {"published": [{"dataset": "RefCOCO", "acc_at_50": 56.1}]}, "published"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_the_key(tmp_path, source, changes, words):
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        load_recipe(write_recipe(tmp_path, source, **changes))
    assert len(str(caught.value)) < 500


LAUGHS = ["a0: &a0 [ha, ha]"]
LAUGHS += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "recipe"),
        ("just text", "recipe"),
        ("a: [", "cannot be read"),
        ("!!python/object:os.system {}", "cannot be read"),
        ("a: 2024-13-45", "cannot be read"),
        ("a: !!bool perhaps", "cannot be read"),
        ("a: !!timestamp never", "cannot be read"),
        pytest.param("a: " + "9" * 5000, "recipe", id="long number"),
        pytest.param("[" * 5000, "cannot be read", id="deep"),
        pytest.param("a" * 60_000 + ": 1", "recipe", id="long key"),
        pytest.param(DEMO.read_text() + "#" * 65_536, "too large", id="large"),
        pytest.param("\n".join(LAUGHS), "aliases", id="laughs"),
        pytest.param(
            DEMO.read_text() + "\nselect_layer: -1\n", "'select_layer' is there twice", id="twice"
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1500


def test_missing_recipe_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")
