"""What several commands say about a bundle, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gap_export.cli._terminal import format_size

if TYPE_CHECKING:
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
    if tiles is None:
        return text
    area = manifest.image.height * manifest.image.width
    most = 1 + max(height * width // area for height, width in tiles.resolutions)
    return (
        f"{text} of each tile (up to {most} tiles: at most {most * pruning.num_kept_tokens} of "
        f"{most * pruning.num_visual_tokens}, and a newline after each row)"
    )


def describe_shared(files: Iterable[FileSpec]) -> str:
    """What some files share with a checkpoint; empty for nothing."""
    files = tuple(files)
    sizes = {held: sum(file.size for file in files if file.held == held) for held in _SHARED}
    return ", ".join(f"{format_size(size)} {_SHARED[held]}" for held, size in sizes.items() if size)
