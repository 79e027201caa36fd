"""What a MODEL argument means, where parts are found, and whether they are what a bundle is of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gap_export.bundle import open_bundle
from gap_export.bundle.files import sha256_of
from gap_export.checkpoint.find.source import (
    Checkpoint,
    check_named_parts,
    check_required_parts,
    parse_parts,
    resolve_model,
    resolve_source,
)
from gap_export.errors import CheckpointError, RecipeError, UnknownModelError, UsageError
from gap_export.spec.manifest import Manifest, SourceFile, SourcePart, SourceSpec, TilesSpec
from gap_export.spec.recipe import CheckpointPart, HubRepository, Recipe, find_recipe

LLAVA, VICUNA = "llava-hf/llava-1.5-7b-hf", "lmsys/vicuna-7b-v1.5"
WHOLE = {"config.json": b"{}", "model.safetensors": b"", "tokenizer.json": b""}
CacheRepository = Callable[..., Path]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and of torch, in place of this machine's."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return cache


@pytest.fixture
def cache_repository(hub_cache: Path) -> CacheRepository:
    """Puts a repository into the cache as the hub's own client does: blobs, links, a ref."""

    def cache(hub_id: str, files: dict[str, bytes] | None = None, *, kind: str = "model") -> Path:
        folder = hub_cache / f"{kind}s--{hub_id.replace('/', '--')}"
        snapshot = folder / "snapshots" / "0123abcd"
        for place in (snapshot, folder / "blobs", folder / "refs"):
            place.mkdir(parents=True)
        (folder / "refs" / "main").write_text("0123abcd")
        for name, content in (files or WHOLE).items():
            (folder / "blobs" / f"blob-{name}").write_bytes(content)
            (snapshot / name).symlink_to(
                os.path.relpath(folder / "blobs" / f"blob-{name}", snapshot)
            )
        return snapshot

    return cache


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_bytes(b"{}")
    return path


# MODEL


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


# parts


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


# where a bundle came from


def test_source_is_found_where_the_manifest_says(tiny_bundle, tiny_checkpoint):
    manifest = open_bundle(tiny_bundle).manifest
    recipe, checkpoint = resolve_source(manifest)
    assert (recipe.name, checkpoint.main) == ("tiny-llava", tiny_checkpoint.resolve())


def test_an_adapter_that_came_after_the_export_is_not_passed_over(
    tiny_bundle, tiny_checkpoint, tmp_path
):
    manifest, copy = open_bundle(tiny_bundle).manifest, tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="an adapter that the bundle was made without"):
        resolve_source(manifest, {"main": copy})


def test_a_checkpoint_with_a_changed_byte_is_not_the_source(tiny_bundle, tiny_checkpoint, tmp_path):
    manifest = open_bundle(tiny_bundle).manifest
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    assert resolve_source(manifest, {"main": copy})[1].main == copy
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not the checkpoint"):
        resolve_source(manifest, {"main": copy})


def test_an_absent_checkpoint_is_refused_with_the_flag_to_use(tiny_bundle, tmp_path):
    manifest = open_bundle(tiny_bundle).manifest
    with pytest.raises(CheckpointError, match="--checkpoint main=PATH"):
        resolve_source(manifest, {"main": tmp_path / "nowhere"})


def part_of(role: str, folder: Path, *names: str) -> SourcePart:
    files = [
        SourceFile(path=n, size=(folder / n).stat().st_size, sha256=sha256_of(folder / n))
        for n in names
    ]
    return SourcePart(role=role, location=str(folder), files=tuple(files))


def manifest_of(sample: Manifest, recipe: Recipe, *parts: SourcePart) -> Manifest:
    """Of a bundle that was exported by a recipe, as far as a source goes."""
    return replace(
        sample,
        model=replace(sample.model, name=recipe.name, family=recipe.family),
        source=SourceSpec(parts=parts),
        **{name: getattr(recipe, name) for name in ("grid", "image", "prompt", "box")},
    )


@pytest.fixture
def three_parts(sample_manifest: Manifest, tmp_path: Path) -> Manifest:
    """Of a bundle that was made from a file, a folder and another file."""
    main = folder_with(tmp_path / "main", "stage3.pth")
    base = folder_with(tmp_path / "base", "config.json", "model.safetensors")
    tower = folder_with(tmp_path / "tower", "eva_vit_g.pth")
    return manifest_of(
        sample_manifest,
        find_recipe("minigpt-v2")[0],
        part_of("main", main, "stage3.pth"),
        part_of("base", base, "config.json", "model.safetensors"),
        part_of("tower", tower, "eva_vit_g.pth"),
    )


def test_parts_of_a_source_are_folders_or_files_as_the_recipe_has_them(three_parts, tmp_path):
    recipe, checkpoint = resolve_source(three_parts)
    assert recipe.name == "minigpt-v2"
    assert checkpoint.parts == {
        "main": tmp_path / "main" / "stage3.pth",
        "base": tmp_path / "base",
        "tower": tmp_path / "tower" / "eva_vit_g.pth",
    }


def test_a_moved_part_of_a_source_is_named_by_its_role(three_parts, tmp_path):
    (tmp_path / "tower").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"not here \(tower\).*--checkpoint tower=PATH"):
        resolve_source(three_parts)
    renamed = (tmp_path / "moved" / "eva_vit_g.pth").rename(tmp_path / "moved" / "eva.pth")
    assert resolve_source(three_parts, {"tower": renamed})[1].parts["tower"] == renamed
    renamed.write_bytes(b"[]")
    with pytest.raises(CheckpointError, match=r"not the checkpoint.*moved/eva\.pth"):
        resolve_source(three_parts, {"tower": renamed})


def test_a_source_is_found_in_the_cache_if_its_folder_is_gone(
    three_parts, cache_repository, tmp_path
):
    (tmp_path / "base").rename(tmp_path / "gone")
    files = {n: (tmp_path / "gone" / n).read_bytes() for n in ("config.json", "model.safetensors")}
    cached = cache_repository("meta-llama/Llama-2-7b-chat-hf", files)
    assert resolve_source(three_parts)[1].parts["base"] == cached


def test_a_part_that_a_source_has_not_got_is_refused(three_parts, tmp_path):
    with pytest.raises(UsageError, match="text; allowed: main, base, tower"):
        resolve_source(three_parts, {"text": tmp_path})


def test_the_source_of_random_weights_is_their_seed(sample_manifest, tmp_path):
    made = manifest_of(sample_manifest, find_recipe("llava")[0])
    manifest = replace(made, source=SourceSpec(parts=(), random_seed=7))
    recipe, checkpoint = resolve_source(manifest)
    assert (recipe.name, checkpoint) == ("llava-1.5-7b", Checkpoint(parts={}, random_seed=7))
    with pytest.raises(UsageError, match="weights are random"):
        resolve_source(manifest, {"main": tmp_path})


def test_a_source_whose_recipe_nobody_has_is_refused(sample_manifest, tmp_path):
    folder = folder_with(tmp_path / "main", "model.safetensors")
    manifest = replace(
        sample_manifest, source=SourceSpec(parts=(part_of("main", folder, "model.safetensors"),))
    )
    with pytest.raises(UnknownModelError, match=r"by is not here: sample; .*put it there"):
        resolve_source(manifest)
    random = replace(manifest, source=SourceSpec(parts=(), random_seed=7))
    with pytest.raises(UnknownModelError, match="not here: sample; allowed: a name of"):
        resolve_source(random)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    plain = json.loads(recipe.model_dump_json())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))


@pytest.mark.parametrize("other", [None, "[not a recipe"])
def test_a_recipe_of_another_name_in_the_folder_was_not_the_one(
    sample_manifest, tiny_checkpoint, tmp_path, other
):
    folder = folder_with(tmp_path / "main", "model.safetensors")
    text = (tiny_checkpoint / "recipe.yaml").read_text() if other is None else other
    (folder / "recipe.yaml").write_text(text)
    llava = find_recipe("llava")[0]
    manifest = manifest_of(sample_manifest, llava, part_of("main", folder, "model.safetensors"))
    assert resolve_source(manifest)[0] == llava


def test_a_broken_recipe_of_the_users_own_is_reported(sample_manifest, tmp_path):
    folder = folder_with(tmp_path / "main", "model.safetensors")
    (folder / "recipe.yaml").write_text("[not a recipe")
    own = find_recipe("llava")[0].model_copy(update={"name": "my-llava"})
    manifest = manifest_of(sample_manifest, own, part_of("main", folder, "model.safetensors"))
    with pytest.raises(RecipeError, match="cannot be read"):
        resolve_source(manifest)


def test_the_order_of_tiles_is_the_checkpoints_and_no_change_of_the_recipe(sample_manifest):
    recipe = find_recipe("llava-next")[0]
    manifest = replace(
        manifest_of(sample_manifest, recipe), source=SourceSpec(parts=(), random_seed=1)
    )
    sizes = tuple(reversed(recipe.image.tiles.resolutions))
    for follows, resolutions in (("authors", sizes), ("transformers", sizes[:-1])):
        tiles = TilesSpec(resolutions=resolutions, follows=follows)
        changed = replace(manifest, image=replace(recipe.image, tiles=tiles))
        if follows == "authors":
            assert resolve_source(changed)[0] == recipe
        else:
            with pytest.raises(CheckpointError, match=r"recipe changed.*image.tiles"):
                resolve_source(changed)


def test_a_bundle_of_before_recipes_named_the_question_is_of_the_recipe(sample_manifest):
    recipe = find_recipe("shikra")[0]
    assert recipe.prompt.question is not None
    source = SourceSpec(parts=(), random_seed=1)
    manifest = replace(manifest_of(sample_manifest, recipe), source=source)
    earlier = replace(manifest, prompt=replace(recipe.prompt, question=None))
    assert resolve_source(earlier)[0] == recipe
    marks = replace(recipe.prompt.question, start="HUMAN:")
    other = replace(manifest, prompt=replace(recipe.prompt, question=marks))
    with pytest.raises(CheckpointError, match=r"recipe changed.*prompt.question"):
        resolve_source(other)


def test_a_recipe_that_changed_since_the_export_is_refused(sample_manifest, tmp_path):
    folder = folder_with(tmp_path / "main", "model.safetensors")
    own = find_recipe("llava")[0].model_copy(update={"name": "my-llava"})
    manifest = manifest_of(sample_manifest, own, part_of("main", folder, "model.safetensors"))
    write_recipe(folder, own)
    assert resolve_source(manifest)[0] == own
    changed = {
        "family": "llava_next",
        "prompt": replace(own.prompt, max_new_tokens=3),
        "box": replace(own.box, scale=7.0),
    }
    write_recipe(folder, own.model_copy(update=changed))
    with pytest.raises(
        CheckpointError,
        match=r"recipe changed .*my-llava: family: .*max_new_tokens: 3 in",
    ):
        resolve_source(manifest)


def test_parts_that_are_files_follow_the_users_own_recipe(sample_manifest, tmp_path):
    from tests.families.tiny_minigpt_v2 import make_minigpt, minigpt_recipe, write_parts

    home, recipe = folder_with(tmp_path / "mini"), minigpt_recipe()
    parts = write_parts(home, make_minigpt())
    write_recipe(home, recipe)
    base = sorted(path.name for path in parts["base"].iterdir())
    manifest = manifest_of(
        sample_manifest,
        recipe,
        part_of("main", home, parts["main"].name),
        part_of("base", parts["base"], *base),
        part_of("tower", home, parts["tower"].name),
    )
    assert resolve_model(str(parts["main"]), parts={r: parts[r] for r in ("base", "tower")}) == (
        recipe,
        Checkpoint(parts=parts),
    )
    assert resolve_source(manifest) == (recipe, Checkpoint(parts=parts))

    moved = shutil.copytree(home, tmp_path / "moved")
    for named in (moved, moved / parts["main"].name):
        found, checkpoint = resolve_source(manifest, {"main": named})
        assert (found, checkpoint.main) == (recipe, moved / parts["main"].name)
    # The recipe stays where it was; or goes, and takes the bundle's with it.
    (moved / "recipe.yaml").unlink()
    assert resolve_source(manifest, {"main": moved})[0] == recipe
    (home / "recipe.yaml").unlink()
    with pytest.raises(UnknownModelError, match="--checkpoint main=PATH"):
        resolve_source(manifest)
