"""The table of ids that a decoder can hold, where pruner, N and the image's place are fixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gap_export.errors import UsageError
from gap_export.families import Reference
from gap_export.pruning import PRESETS, FixedPruner, find_pruner
from gap_export.runtime.prompt import PromptEncoder
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import VisualSpan, build_id_table, build_kept_positions

_FLAG = "--bake-positions"
_PROBE = "object"


def bake_positions(
    manifest: Manifest, reference: Reference, assets: Path
) -> tuple[tuple[int, ...], ...]:
    """Ids of a prompt's tokens up to the first behind the image, the same in every prompt.

    Those of the text that follows count on from there, so that its length does not matter.

    Args:
        manifest: Without graphs.
        reference: Of the same model.
        assets: Folder of its tokenizers.

    Returns:
        A rows, one for each axis of positions, of as many ids.

    Raises:
        UsageError: something of it is not the same in every prompt; by name.
    """
    _check_fixed(manifest)
    constants = reference.component("vision_encoder").constants
    grid = manifest.grid
    start = len(PromptEncoder(manifest, assets).encode(_PROBE).prefix_ids)
    span = VisualSpan(
        start=start,
        num_visual_tokens=grid.num_visual_tokens,
        keep_indices=np.asarray(constants["fixed_places"], dtype=np.int64),
        grid=(grid.rows, grid.cols),
    )
    length = start + grid.num_visual_tokens + 1
    axes = manifest.decoder.position_axes
    kept = build_kept_positions(unpruned_length=length, spans=[span])
    table = build_id_table(kept, unpruned_length=length, spans=[span], position_axes=axes)
    return tuple(tuple(map(int, row)) for row in table.reshape(axes, -1))


def _check_fixed(manifest: Manifest) -> None:
    pruning, prompt, image = manifest.pruning, manifest.prompt, manifest.image
    if not isinstance(find_pruner(pruning.pruner), FixedPruner):
        fixed = [name for name in PRESETS if isinstance(find_pruner(name), FixedPruner)]
        raise UsageError(
            f"{_FLAG}: each image decides anew which tokens this pruner keeps",
            seen=pruning.pruner,
            allowed=", ".join(fixed),
            fix=f"choose one of them, or leave out {_FLAG}",
        )
    expression, place = (
        prompt.template.find("{expression}"),
        prompt.template.find(prompt.image_token),
    )
    for why, seen, allowed in (
        ("an image is cut into as many tiles as its shape asks for", image.tiles, "no tiles"),
        ("images have canvases of several shapes", image.grids or None, "one canvas"),
        (
            "ids are re-numbered, which is what any runtime feeds by itself",
            None if pruning.positions == "gap" else pruning.positions,
            "--positions gap",
        ),
        (
            "the extra token stands behind all others",
            None if pruning.extra_token == "none" else pruning.extra_token,
            "--extra-token none",
        ),
        (
            "what tokens count as is fed in attention_mask",
            None if pruning.attention == "plain" else pruning.attention,
            "--attention plain",
        ),
        (
            "the expression stands before the image, whose place so depends on it",
            prompt.template if expression < place else None,
            "a template with the image first",
        ),
    ):
        if seen is not None:
            raise UsageError(
                f"{_FLAG}: {why}", seen=seen, allowed=allowed, fix=f"leave out {_FLAG}"
            )
