"""Where a bundle came from, and whether what is found there is what it was made of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gap_export.bundle import open_bundle
from gap_export.bundle.files import sha256_of
from gap_export.checkpoint.find.bundle_source import resolve_source
from gap_export.checkpoint.find.source import Checkpoint, resolve_model
from gap_export.errors import CheckpointError, RecipeError, UnknownModelError, UsageError
from gap_export.spec.manifest import Manifest, SourceFile, SourcePart, SourceSpec, TilesSpec
from gap_export.spec.recipe import Recipe, find_recipe
from tests.checkpoint.find.conftest import folder_with

pytestmark = pytest.mark.usefixtures("hub_cache")


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
