"""What an export writes into the manifest before and beside the graphs."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export.bundle import BundleDraft
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import BundleError, CheckpointError, ExpressionError
from gap_export.spec.family import FAMILY_MARK, OTHER_FAMILIES
from gap_export.spec.manifest import (
    Manifest,
    ModelSpec,
    PruningSpec,
    SourceFile,
    SourcePart,
    SourceSpec,
    TensorPlace,
)
from gap_export.spec.recipe import Recipe
from gap_export.version import __version__

if TYPE_CHECKING:
    from gap_export.exporting.place_weights import PlacedWeights
    from gap_export.families import Reference

# Stands for every expression: what the model cannot be asked with it, it cannot be asked at all.
_PROBE = "object"
_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
_OPSET = 20
# INT4 came with this one.
_OPSET_QUANTIZED = 21


def describe_bundle(
    recipe: Recipe,
    pruning: PruningSpec,
    reference: Reference,
    placed: PlacedWeights | None,
    *,
    is_quantized: bool,
) -> Manifest:
    """All that is known before the graphs are made; without weights, before those are placed."""
    from gap_export.pruning import PACKAGE_MARK, package_of

    newline = None
    if placed is not None and reference.newline_weight is not None:
        place = placed.of({"newline": reference.newline_weight})["newline"]
        newline = TensorPlace(
            file=place.location, offset=place.offset, dtype=reference.dtype, shape=place.shape
        )
    # The packages that pruner and family are of, where not ours: ``check`` needs them again.
    packages = {
        PACKAGE_MARK: package_of(pruning.pruner),
        FAMILY_MARK: OTHER_FAMILIES.package_of(recipe.family),
    }
    marked = {f"{mark}{one}": version(one) for mark, one in packages.items() if one is not None}
    return Manifest(
        model=ModelSpec(
            name=recipe.name, family=recipe.family, summary=recipe.summary, license=recipe.license
        ),
        source=SourceSpec(parts=()),
        pruning=pruning,
        grid=recipe.grid,
        image=reference.image(recipe),
        prompt=recipe.prompt,
        box=recipe.box,
        text_encoder=reference.text_encoder_spec,
        decoder=reference.decoder_spec,
        newline=newline,
        dtype=reference.dtype,
        opset=_OPSET_QUANTIZED if is_quantized else _OPSET,
        graphs=(),
        files=(),
        tools={**tool_versions(), **marked},
    )


def check_prompt(manifest: Manifest, assets: Path, image_token_id: int | None, where: str) -> int:
    """Ask for something, as a user of the bundle will, and see that the model can read it.

    Returns:
        Tokens of the prompt beside image and expression.

    Raises:
        CheckpointError: a tokenizer is broken, it, the config and the recipe do not fit, or the
            image leaves no ids for a prompt.
    """
    from gap_export.runtime.prompt import NO_ROOM, PromptEncoder

    try:
        prompts = PromptEncoder(manifest, assets)
        encoded = prompts.encode(_PROBE)
    except (BundleError, ExpressionError) as err:
        fix = "restore the checkpoint's tokenizer.json, or correct the recipe's prompt"
        if err.what == NO_ROOM:
            fix = "choose a smaller canvas, or a shorter prompt or answer in the recipe"
        raise CheckpointError(
            f"no prompt can be made with the tokenizer of {where} and recipe {manifest.model.name}",
            seen=err.what if err.seen is None else f"{err.what}: {err.seen}",
            allowed=err.allowed,
            fix=fix,
        ) from err
    if prompts.image_token_id is not None and prompts.image_token_id != image_token_id:
        raise CheckpointError(
            f"{where}: config.json and tokenizer.json disagree on the image token "
            f"{manifest.prompt.image_token}",
            seen=f"image_token_index {image_token_id}",
            allowed=f"{prompts.image_token_id}, the tokenizer's id",
            fix="use the files that belong together",
        )
    largest = int(max([*encoded.prefix_ids, *encoded.suffix_ids]))
    if largest >= manifest.decoder.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer gives ids that the model has not got",
            seen=largest,
            allowed=f"0..{manifest.decoder.vocab_size - 1}",
            fix="use the tokenizer.json that belongs to these weights",
        )
    # At least one token was the probe's, so this is never too few.
    return len(encoded.prefix_ids) + len(encoded.suffix_ids) - 1


def describe_source(
    draft: BundleDraft, checkpoint: Checkpoint, files: Iterable[tuple[str, Path]]
) -> SourceSpec:
    """Where the weights are from; waits for the hashes."""
    parts: list[SourcePart] = []
    by_role: dict[str, list[Path]] = {}
    for role, path in files:
        by_role.setdefault(role, []).append(path)
    for role, paths in by_role.items():
        place = checkpoint.parts[role]
        folder = place if place.is_dir() else place.parent
        listed = [
            SourceFile(
                path=path.relative_to(folder).as_posix(),
                size=path.stat().st_size,
                sha256=draft.hasher.sha256(path),
            )
            for path in sorted(set(paths))
        ]
        parts.append(SourcePart(role=role, location=str(folder.resolve()), files=tuple(listed)))
    return SourceSpec(parts=tuple(parts), random_seed=checkpoint.random_seed)


def tool_versions(names: Sequence[str] = _TOOLS) -> dict[str, str]:
    """Version of each tool that has a part in making a bundle, where it is installed."""
    found = {"gap-export": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
