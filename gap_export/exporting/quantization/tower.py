"""A vision tower of 8-bit integers: which layers, and their weights in a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from gap_export.bundle import BundleDraft
from gap_export.checkpoint.weights import INT8_NAME, Int8Place, store_int8
from gap_export.errors import UsageError
from gap_export.families import Component, Reference
from gap_export.progress import Progress

TOWER = "vision_encoder"
_LAYERS = "tower.encoder.layers."


def tower_keys(component: Component) -> tuple[str, ...]:
    """Keys of the weights [out, in] of the tower's layers, in the module's order.

    The patch projection before them, and pruner and projector behind them, are no part of these.
    """
    return tuple(
        f"{name}.weight"
        for name, module in component.module.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(_LAYERS)
    )


def check_tower(dtype: str) -> None:
    """Refuse graphs whose tower cannot be of 8-bit integers.

    Args:
        dtype: Of the graphs' floats.

    Raises:
        UsageError: it is not float32.
    """
    if dtype != "float32":
        raise UsageError(
            "an int8 tower rounds float32, which these graphs do not compute in",
            seen=dtype,
            allowed="float32",
            fix="add --dtype float32, or --for cpu, or leave out --vision-dtype",
        )


def store_tower(
    draft: BundleDraft, reference: Reference, *, progress: Progress
) -> Mapping[str, Int8Place]:
    """Write the weights of the tower's layers into the bundle as 8-bit integers.

    Args:
        draft: The bundle.
        reference: On the meta device.
        progress: Progress reporter, in values.

    Returns:
        Where each lies, by its key in the vision encoder.

    Raises:
        CheckpointError: a weight cannot be read, or is not finite.
        OutputError: the disk is full or cannot be written.
    """
    component = reference.component(TOWER)
    weights = {f"{TOWER}.{key}": component.weight_refs[key] for key in tower_keys(component)}
    path = draft.folder / INT8_NAME
    total = sum(math.prod(weight.shape) for weight in weights.values())
    with progress.stage("quantizing the tower", total=total) as step:
        places = store_int8(path, weights, advance=step)
    draft.hasher.start(path)
    return {name.removeprefix(f"{TOWER}."): place for name, place in places.items()}
