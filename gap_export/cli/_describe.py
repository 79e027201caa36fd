"""What several commands say about a bundle, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gap_export.cli._terminal import format_size

if TYPE_CHECKING:
    from gap_export.bundle import Bundle
    from gap_export.spec.manifest import FileSpec, Manifest

# How files that take no room of their own got into a bundle.
_SHARED = {"linked": "linked to the checkpoint", "cloned": "cloned from the checkpoint"}


def describe_tokens(manifest: Manifest) -> str:
    """The number of visual tokens that stay, of an image or of each of its tiles."""
    pruning, tiles = manifest.pruning, manifest.image.tiles
    text = f"{pruning.num_kept_tokens} of {pruning.num_visual_tokens} visual tokens"
    if pruning.budget == "adaptive":
        text = f"as many as stand out, 1 to {text}"
        if pruning.kept_buckets:
            text += f" (rounded up to one of {', '.join(map(str, pruning.kept_buckets))})"
    if pruning.extra_token != "none":
        text += f" and an extra one, {pruning.extra_token} of what is dropped"
    if pruning.attention == "proportional":
        text += ", each counting as many as there were for it"
    if tiles is None:
        return text
    area = manifest.image.height * manifest.image.width
    most = 1 + max(height * width // area for height, width in tiles.resolutions)
    newlines = ", and a newline after each row" if manifest.image.has_newlines else ""
    return (
        f"{text} of each tile (up to {most} tiles: at most {most * pruning.num_kept_tokens} of "
        f"{most * pruning.num_visual_tokens}{newlines})"
    )


def describe_shared(files: Iterable[FileSpec]) -> str:
    """What some files share with a checkpoint; empty for nothing."""
    files = tuple(files)
    sizes = {held: sum(file.size for file in files if file.held == held) for held in _SHARED}
    return ", ".join(f"{format_size(size)} {_SHARED[held]}" for held, size in sizes.items() if size)


def find_engines(bundle: Bundle) -> list[dict[str, Any]]:
    """Each folder of engines as JSON data; ``problem`` says why one cannot be used."""
    from gap_export.engines.folder import engine_folders, read_engine_folder
    from gap_export.errors import BundleError

    found: list[dict[str, Any]] = []
    for name in engine_folders(bundle):
        try:
            plan = read_engine_folder(bundle, name).plan
        except BundleError as err:
            found.append({"folder": name, "problem": str(err)})
            continue
        found.append(
            {
                "folder": name,
                "problem": None,
                "library": f"{plan.library} {plan.library_version}",
                "compute_capability": plan.compute_capability,
                "engines": [
                    {
                        "component": engine.component,
                        "size_bytes": engine.size,
                        "lowering": engine.lowering,
                        "dtype": engine.dtype,
                        "quantization": engine.quantization and engine.quantization.dtype,
                        "weights": engine.weights,
                        "profiles": [profile.name for profile in engine.profiles],
                    }
                    for engine in plan.engines
                ],
            }
        )
    return found


def describe_targets(manifest: Manifest) -> list[str]:
    """A section on what the bundle was made for; none where it is nothing."""
    limits = manifest.engine_limits
    if limits is None:
        return []
    lines = [
        f"engines    for prompts of up to {limits.max_prompt} tokens, answers of up to "
        f"{limits.max_new_tokens}, {limits.max_batch} at a time"
    ]
    for target in manifest.targets:
        lines.append(f"target {target.name} ({target.lowering}, {target.dtype})")
        for verdict in target.preflight:
            operators = f" ({', '.join(verdict.operators)})" if verdict.operators else ""
            lines.append(f"  {verdict.component}: {verdict.verdict}{operators}")
            lines += [f"    {reason}" for reason in verdict.reasons]
    return ["\n".join(lines)]


def describe_engines(folders: list[dict[str, Any]]) -> list[str]:
    """A section on the engines; none where there are none."""
    lines: list[str] = []
    for folder in folders:
        if folder["problem"] is not None:
            lines.append(f"engines/{folder['folder']}: cannot be used: {folder['problem']}")
            continue
        lines.append(f"engines/{folder['folder']}: {folder['library']}")
        for engine in folder["engines"]:
            form = ", ".join(
                filter(None, (engine["lowering"], engine["dtype"], engine["quantization"]))
            )
            lines.append(
                f"  {engine['component']}: {format_size(engine['size_bytes'])}, {form}, weights "
                f"{engine['weights']}, profiles {' and '.join(engine['profiles'])}"
            )
    return ["\n".join(lines)] if lines else []
