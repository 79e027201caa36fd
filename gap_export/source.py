"""Where a model's weights are: what a MODEL argument means, and where a bundle came from."""

from __future__ import annotations

import reprlib
from hashlib import sha256
from pathlib import Path

from gap_export.errors import CheckpointError, UnknownModelError
from gap_export.manifest import Manifest
from gap_export.recipe import RECIPE_NAME, Recipe, find_recipe, load_recipe

_MAX_SHOWN = 300


def resolve_model(model: str, recipe: str | None = None) -> tuple[Recipe, Path]:
    """The recipe and the checkpoint folder that a MODEL argument means.

    A recipe name or alias wins over a folder of the same name; ``./name`` always means the folder.

    An absolute path always means the folder, so a caller that holds one passes
    ``str(folder.resolve())``: a :class:`Path` forgets its ``./``.

    Raises:
        UnknownModelError: neither a recipe nor a folder.
        CheckpointError: a folder without recipe.yaml, and no recipe was named.
    """
    if not model.strip() or "\0" in model:
        raise UnknownModelError(
            "no model is named so",
            seen=reprlib.repr(model),
            allowed="a name of: gap-export models, or a checkpoint folder",
        )
    folder = Path(model)
    is_path = folder.is_absolute() or model.startswith((".", "~")) or recipe is not None
    if not is_path:
        try:
            found, home = find_recipe(model)
        except UnknownModelError:
            if not _is_folder(folder):
                raise
        else:
            if found.checkpoint.kind == "bundled":
                return found, home
            raise CheckpointError(
                f"the weights of {found.name} do not come with gap-export",
                fix=f"name their folder: gap-export PATH --recipe {found.name}",
            )
    try:
        folder = folder.expanduser()
    except RuntimeError as err:
        raise CheckpointError(
            "the home folder of that user is not known",
            seen=reprlib.repr(model),
            fix="write the path out in full",
        ) from err
    if not _is_folder(folder):
        raise CheckpointError(
            "checkpoint folder not found",
            seen=str(folder)[:_MAX_SHOWN],
            allowed="a folder with config.json and safetensors, or a name of: gap-export models",
        )
    if recipe is not None:
        return find_recipe(recipe)[0], folder
    if (folder / RECIPE_NAME).is_file():
        return load_recipe(folder / RECIPE_NAME), folder
    raise CheckpointError(
        f"the checkpoint folder has no {RECIPE_NAME}",
        seen=folder,
        fix="say which recipe it follows: --recipe NAME (names: gap-export models)",
    )


def resolve_source(manifest: Manifest, checkpoint: Path | None) -> tuple[Recipe, Path]:
    """The recipe and the checkpoint a bundle was made from, proved by the hashes of its files.

    Args:
        manifest: The bundle's.
        checkpoint: Where to look; None: where the manifest says it was, or, for a bundled model,
            where it is in this installation.

    Raises:
        CheckpointError: not there, or its files are not the ones the bundle was made from.
        UnknownModelError: the folder has no recipe.yaml and no shipped recipe has the name.
    """
    places = [checkpoint] if checkpoint else [Path(manifest.source.location)]
    if checkpoint is None:
        try:
            recipe, home = find_recipe(manifest.model.name)
        except UnknownModelError:
            pass
        else:
            if recipe.checkpoint.kind == "bundled":
                places.append(home)
    place = next((p for p in places if _is_folder(p)), None)
    if place is None:
        raise CheckpointError(
            "the checkpoint this bundle was made from is not here",
            seen=", ".join(map(repr, map(str, places)))[:_MAX_SHOWN],
            fix="say where it is: --checkpoint FOLDER",
        )
    for file in manifest.source.files:
        path = place / file.path
        if not path.is_file() or path.stat().st_size != file.size or hash_file(path) != file.sha256:
            raise CheckpointError(
                "this is not the checkpoint the bundle was made from",
                seen=f"{path} is missing or differs",
                allowed=f"sha256 {file.sha256}",
                fix="give the right folder with --checkpoint, or export the bundle again",
            )
    own = place / RECIPE_NAME
    return (load_recipe(own) if own.is_file() else find_recipe(manifest.model.name)[0]), place


def _is_folder(path: Path) -> bool:
    """Whether there is such a folder; a name no file system can hold is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
