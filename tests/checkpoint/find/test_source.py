"""What a MODEL argument means, where parts are found, and whether they are what a bundle is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gap_export.checkpoint.find.source import (
    Checkpoint,
    check_named_parts,
    check_required_parts,
    parse_parts,
    resolve_model,
)
from gap_export.errors import CheckpointError, UnknownModelError, UsageError
from gap_export.spec.recipe import CheckpointPart, HubRepository, find_recipe
from tests.checkpoint.find.conftest import WHOLE, folder_with

LLAVA, VICUNA = "llava-hf/llava-1.5-7b-hf", "lmsys/vicuna-7b-v1.5"
pytestmark = pytest.mark.usefixtures("hub_cache")


def test_a_folder_with_a_recipe_is_a_model(tiny_checkpoint):
    recipe, checkpoint = resolve_model(str(tiny_checkpoint))
    assert recipe.name == "tiny-llava"
    assert checkpoint == Checkpoint.of(tiny_checkpoint)


def test_a_bundled_name_is_a_model():
    recipe, checkpoint = resolve_model("refshapes-llava")
    assert checkpoint.main.name == recipe.name == "refshapes-llava"


def test_bundled_weights_give_way_to_those_named(tmp_path):
    mine = folder_with(tmp_path / "mine")
    assert resolve_model("demo", parts={"main": mine})[1] == Checkpoint.of(mine)


def test_a_folder_without_recipe_needs_one_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="--recipe"):
        resolve_model(str(tmp_path))
    recipe, checkpoint = resolve_model(str(tmp_path), recipe="refshapes-llava")
    assert (recipe.name, checkpoint.main) == ("refshapes-llava", tmp_path)


@pytest.mark.parametrize("recipe", [None, "llava"])
def test_a_bundle_is_no_model(tiny_bundle, recipe):
    with pytest.raises(UsageError, match=r"this is a bundle.*gap-export check, ground, eval"):
        resolve_model(str(tiny_bundle), recipe=recipe)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("/tmp/there/is/no/such/folder", CheckpointError, "not found"),
        ("./" + "a" * 300, CheckpointError, "not found"),
        ("~nosuchuser/x", CheckpointError, "home folder.*~nosuchuser/x"),
        *(
            (name, UnknownModelError, "no model")
            for name in ("no-such-model", "", " ", "a\0b", "a" * 300, "a/" * 4000, "nobody/a--b")
        ),
    ],
)
def test_what_is_neither_a_place_nor_a_name_is_refused(model, error, words):
    with pytest.raises(error, match=words) as caught:
        resolve_model(model)
    assert len(str(caught.value)) < 1000


def test_a_folder_named_as_a_recipe_is_meant_by_its_path(tiny_checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "refshapes-llava"
    folder.mkdir()
    shutil.copy(tiny_checkpoint / "recipe.yaml", folder)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("refshapes-llava")[0].name == "refshapes-llava"
    for path in ("./refshapes-llava", str(folder)):
        assert resolve_model(path)[0].name == "tiny-llava"


def test_a_hub_id_is_the_recipe_that_names_it_and_that_repository_alone(cache_repository):
    original = "liuhaotian/llava-v1.5-7b"
    cache_repository(LLAVA)
    with pytest.raises(CheckpointError, match=f"hf download {original}"):
        resolve_model(original)
    cached = cache_repository(original)
    recipe, checkpoint = resolve_model(original)
    assert (recipe.name, checkpoint.main) == ("llava-1.5-7b", cached)


def test_a_folder_wins_over_a_hub_id(cache_repository, tmp_path, monkeypatch, tiny_checkpoint):
    cache_repository(LLAVA)
    local = folder_with(tmp_path / LLAVA)
    shutil.copy(tiny_checkpoint / "recipe.yaml", local)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(LLAVA)[0].name == "tiny-llava"


def test_a_hub_id_that_no_recipe_names_needs_one(cache_repository):
    cached = cache_repository("somebody/finetuned")
    with pytest.raises(UnknownModelError, match="the hub id of one"):
        resolve_model("somebody/finetuned")
    recipe, checkpoint = resolve_model("somebody/finetuned", recipe="llava")
    assert (recipe.name, checkpoint.main) == ("llava-1.5-7b", cached)
    with pytest.raises(CheckpointError, match="hf download somebody/else"):
        resolve_model("somebody/else", recipe="llava")


def test_parts_are_found_in_the_cache_and_a_named_one_overrides(cache_repository, tmp_path):
    cached = cache_repository(LLAVA)
    base = cache_repository(VICUNA)
    assert resolve_model("llava")[1] == Checkpoint(parts={"main": cached, "base": base})
    mine = folder_with(tmp_path / "mine")
    checkpoint = resolve_model("llava", parts={"base": mine})[1]
    assert checkpoint.parts == {"main": cached, "base": mine}


def test_the_first_repository_that_is_complete_is_taken(cache_repository):
    index = json.dumps(
        {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    )
    names = {"config.json": b"{}", "model.safetensors.index.json": index.encode()}
    cache_repository(LLAVA, {**names, "model-1-of-2.safetensors": b""})
    with pytest.raises(CheckpointError, match=r"there, but without model-2-of-2\.safetensors"):
        resolve_model("llava")
    original = cache_repository("liuhaotian/llava-v1.5-7b")
    assert resolve_model("llava")[1].main == original


def test_a_snapshot_without_weights_is_not_here(cache_repository):
    cache_repository(LLAVA, {"config.json": b"{}"})
    with pytest.raises(CheckpointError, match="there, but without weights"):
        resolve_model("llava")


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("model-00001-of-00003.safetensors",), "model-00002-of-00003.safetensors and 2 more"),
        (("pytorch_model-00001-of-00001.bin",), "pytorch_model.bin.index.json"),
        # What LLaVA's authors publish beside the shards is no whole model.
        (
            ("mm_projector.bin", "pytorch_model-00001-of-00002.bin"),
            "pytorch_model-00002-of-00002.bin and 1 more",
        ),
    ],
)
def test_shards_without_their_index_are_a_download_cut_short(cache_repository, names, missing):
    files = dict.fromkeys(("config.json", "tokenizer.json", *names), b"{}")
    cache_repository(LLAVA, files)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("llava")
    text = str(caught.value)
    assert f"({LLAVA} is there, but without {missing})" in text
    assert f"not finished: run `hf download {LLAVA}` again" in text


def test_whole_weights_beside_shards_are_enough(cache_repository):
    files = {**WHOLE, "pytorch_model-00001-of-00002.bin": b""}
    cached = cache_repository(LLAVA, files)
    assert resolve_model("llava")[1].main == cached


def test_a_download_without_tokenizer_is_not_finished_unless_another_part_has_it(cache_repository):
    bare = {"config.json": b"{}", "model.safetensors": b""}
    cache_repository(LLAVA, bare)
    with pytest.raises(CheckpointError, match=r"but without tokenizer\.json or tokenizer\.model"):
        resolve_model("llava")
    lora = cache_repository("liuhaotian/llava-v1.5-7b-lora", {**bare, "adapter_config.json": b""})
    assert resolve_model("llava")[1].main == lora
    for name in ("shikras/shikra-7b-delta-v1", "huggyllama/llama-7b"):
        cache_repository(name, bare)
    cache_repository("openai/clip-vit-large-patch14", bare)
    assert set(resolve_model("shikra")[1].parts) == {"main", "base", "tower"}


@pytest.mark.parametrize("index", [b"[" * 5000, b"[1]", b'{"weight_map": 3}', b"\xff"])
def test_a_broken_index_is_left_to_the_reader_of_weights(cache_repository, index):
    cached = cache_repository(
        LLAVA,
        {
            "config.json": b"{}",
            "tokenizer.model": b"",
            "model.safetensors.index.json": index,
            "a.safetensors": b"",
        },
    )
    assert resolve_model("llava")[1].main == cached


def test_all_missing_parts_are_one_error_that_says_where_and_how(hub_cache):
    with pytest.raises(CheckpointError) as caught:
        resolve_model("minigpt-v2")
    text = str(caught.value)
    assert text.startswith("weights of minigpt-v2 are not on this machine: main, base, tower")
    for words in (
        f"Vision-CAIR/MiniGPT-v2 in {hub_cache}",
        "hf download Vision-CAIR/MiniGPT-v2 minigptv2_checkpoint.pth --repo-type space",
        "hf download meta-llama/Llama-2-7b-chat-hf",
        "BLIP2/eva_vit_g.pth",
        "--checkpoint main=PATH",
        "--checkpoint base=PATH",
        "--checkpoint tower=PATH",
    ):
        assert words in text


def test_parts_that_are_files_are_found_and_named_by_file_or_folder(cache_repository, tmp_path):
    name = "minigptv2_checkpoint.pth"
    main = cache_repository("Vision-CAIR/MiniGPT-v2", {name: b"1"}, kind="space") / name
    base = cache_repository("meta-llama/Llama-2-7b-chat-hf")
    tower = folder_with(tmp_path / "torch" / "hub" / "checkpoints", "eva_vit_g.pth")
    tower /= "eva_vit_g.pth"
    wanted = {"main": main, "base": base, "tower": tower}
    assert resolve_model("minigpt-v2")[1].parts == wanted

    mine = folder_with(tmp_path / "mine", "eva_vit_g.pth", "stage3.pth")
    for path in (mine, mine / "eva_vit_g.pth"):
        parts = resolve_model("minigpt-v2", parts={"tower": path})[1].parts
        assert parts == {**wanted, "tower": mine / "eva_vit_g.pth"}
    _, checkpoint = resolve_model(str(mine / "stage3.pth"), recipe="minigpt-v2")
    assert checkpoint.main == mine / "stage3.pth"


def test_a_part_that_is_named_must_be_there_and_of_its_kind(cache_repository, tmp_path):
    cache_repository(LLAVA)
    with pytest.raises(CheckpointError, match="the part base of the checkpoint is not there"):
        resolve_model("llava", parts={"base": tmp_path / "nowhere"})
    file = folder_with(tmp_path, "model.safetensors") / "model.safetensors"
    with pytest.raises(CheckpointError, match="must be a folder"):
        resolve_model("llava", parts={"base": file})
    with pytest.raises(CheckpointError, match=r"eva_vit_g\.pth"):
        resolve_model("minigpt-v2", parts={"tower": tmp_path})


def test_an_unknown_role_is_refused_with_those_there_are(cache_repository, tmp_path):
    cache_repository(LLAVA)
    with pytest.raises(UsageError, match="llm; allowed: main, base, tower"):
        resolve_model("llava", parts={"llm": tmp_path})
    with pytest.raises(UsageError, match="allowed: main; "):
        resolve_model("demo", parts={"base": tmp_path})


def test_the_main_part_is_named_once(tmp_path):
    with pytest.raises(UsageError, match="named twice"):
        resolve_model(str(tmp_path), recipe="llava", parts={"main": tmp_path})


def test_random_weights_take_no_checkpoint(tmp_path):
    recipe, checkpoint = resolve_model("shikra", random_seed=5)
    assert (recipe.name, checkpoint) == ("shikra-7b", Checkpoint(parts={}, random_seed=5))
    with pytest.raises(UsageError, match="random weights need no checkpoint: main"):
        resolve_model("shikra", parts={"main": tmp_path}, random_seed=5)


def test_named_and_required_parts_must_be_there(tmp_path):
    recipe = find_recipe("llava")[0]
    for check in (check_named_parts, check_required_parts):
        check(recipe, Checkpoint.of(tmp_path))
    with pytest.raises(CheckpointError, match="are not on this machine: main"):
        check_required_parts(recipe, Checkpoint(parts={"base": tmp_path}))
    with pytest.raises(UsageError, match="no such part: llm"):
        check_named_parts(recipe, Checkpoint(parts={"main": tmp_path, "llm": tmp_path}))


def test_what_the_published_main_part_needs_one_of_the_users_may_hold(cache_repository, tmp_path):
    cache_repository("openai/clip-vit-large-patch14")
    with pytest.raises(CheckpointError, match="this machine: main, base;"):
        resolve_model("shikra")
    merged = folder_with(tmp_path / "merged")
    recipe, checkpoint = resolve_model("shikra", parts={"main": merged})
    assert set(checkpoint.parts) == {"main", "tower"}
    check_required_parts(recipe, checkpoint)
    with pytest.raises(CheckpointError, match="this machine: base, tower;") as caught:
        check_required_parts(recipe, Checkpoint.of(merged))
    # An error is one line: what others may have written in it cannot begin another.
    (about,) = [text for text in str(caught.value).split(" -- ") if "not needed" in text]
    assert "by itself. base: " in about and "\\n" not in str(caught.value)
    cache_repository("shikras/shikra-7b-delta-v1")
    with pytest.raises(CheckpointError, match="this machine: base;"):
        resolve_model("shikra")


def test_an_optional_part_is_missed_only_when_it_is_asked_for(cache_repository):
    cache_repository(LLAVA)
    recipe, checkpoint = resolve_model("llava")
    with pytest.raises(CheckpointError, match="hf download openai/clip-vit-large-patch14-336"):
        checkpoint.part("tower", recipe)


def test_how_to_get_follows_revision_and_kind_of_repository(tmp_path):
    hub = HubRepository(id="a/b", revision="v2")
    recipe = find_recipe("llava")[0]
    parts = {**recipe.checkpoint.parts, "tower": CheckpointPart(what="x", hub=hub)}
    changed = recipe.model_copy(
        update={"checkpoint": recipe.checkpoint.model_copy(update={"parts": parts})}
    )
    with pytest.raises(CheckpointError, match="`hf download a/b --revision v2`"):
        Checkpoint.of(tmp_path).part("tower", changed)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ([], {}),
        (["/w"], {"main": "/w"}),
        (["main=/w", "base=/b"], {"main": "/w", "base": "/b"}),
        (["base=/b", "w"], {"base": "/b", "main": "w"}),
        (["base=b=c"], {"base": "b=c"}),
        (["main=v=2"], {"main": "v=2"}),
        (["./v=2"], {"main": "v=2"}),
        (["/data/v=2"], {"main": "/data/v=2"}),
        (["a-b=c"], {"main": "a-b=c"}),
    ],
)
def test_a_word_before_an_equals_sign_is_a_role(values, parts):
    assert parse_parts(values) == {role: Path(path) for role, path in parts.items()}


def test_a_tilde_after_the_role_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_parts(["base=~/llama"]) == {"base": Path("/home/me/llama")}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["base="], "names no path"),
        ([""], "names no path"),
        (["a\0b"], "names no path"),
        (["/a", "/b"], "names the part main twice"),
        (["/a", "main=/b"], "names the part main twice"),
        (["base=/a", "base=/b"], "names the part base twice"),
    ],
)
def test_parts_that_contradict_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        parse_parts(values)
