"""Whether a base model is the one a delta was made from.

A delta to another model of the same shape adds up without complaint, and what comes out answers,
only worse: Shikra's delta is to LLaMA-7B, and with Vicuna as its base, which is LLaMA-7B trained
further, RefCOCO drops by 8 points and more (shikras/shikra#49). Two checks are possible.

*By name*: a config.json, or a folder, that says it is a model trained further.

*By arithmetic*: the delta was made by subtracting float16 numbers in float16. Where the difference
is at most half of the base's value, such a subtraction is exact (Sterbenz's lemma), so that delta
plus base, computed exactly, is again a float16 number: the model's. With another base nothing makes
it one, and for some numbers it is none. Simulated with normal values: 0.2 % where the wrong base
differs by 0.03 % of the size of its weights, 4 % where it differs by 3 %, and none at all for the
right base. A bfloat16 copy of the right base is found out as well.

Not detectable: which base a delta of higher precision, or one stored as bfloat16, belongs to.
Nothing but its name then speaks against a wrong one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from gap_export.checkpoint.weights import Weight, rows
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.matching import peek_config
from gap_export.families.common.checkpoints.parts import LanguageModel, what_it_is
from gap_export.spec.recipe import Recipe

logger = logging.getLogger(__name__)

# Models of LLaMA-7B's very shape that were trained further.
_TRAINED_FURTHER = ("vicuna", "alpaca", "koala", "wizard", "guanaco")
# Scales of RMS norms are far above this, their changes by training far below.
_LEAST_NORM = 0.25
_FINAL_NORM = "decoder.norm.weight"
# These change in any training of the whole model.
_SAMPLED = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight")
_SAMPLE_SIZE = 1 << 20
# Between none at all and the fewest of a wrong base.
_FEW = 1e-4
# Above this it is no matter of the base: the delta itself is finer than float16 numbers are.
_MOST = 0.5


def is_whole_model(final_norm: Weight) -> bool:
    """Whether weights are those of a model and not a delta, judged by its final norm's scales.

    Raises:
        CheckpointError: they cannot be read.
    """
    return float(final_norm.load().float().abs().mean()) > _LEAST_NORM


def check_delta_base(
    delta: Mapping[str, Weight], base: LanguageModel, recipe: Recipe, *, role: str
) -> None:
    """Refuse a base that the delta was not made from, where that is detectable.

    Reads some megabytes of each.

    Args:
        delta: By our names.
        base: Has the right shapes.
        recipe: Says in words what the base is.
        role: The base's role.

    Raises:
        CheckpointError: a delta itself, a model trained further, or one that does not add up.
    """
    what = what_it_is(recipe, role)
    advice = f"use {what}, in float16; or name a model merged elsewhere as the main part"
    if not is_whole_model(base.weights[_FINAL_NORM]):
        raise CheckpointError(
            f"the base model of {recipe.name} is itself a delta, no whole model",
            seen=base.folder,
            allowed=what,
            fix=advice,
        )
    saved_as, place = peek_config(base.folder).get("_name_or_path"), base.folder.resolve()
    names = [Path(saved_as).name] if isinstance(saved_as, str) else []
    # In the hub's cache the name is that of an outer folder.
    names += [place.name, *(part for part in place.parts if part.startswith("models--"))]
    name = next((n for n in names if any(word in n.lower() for word in _TRAINED_FURTHER)), None)
    if name is not None:
        raise CheckpointError(
            f"{base.folder} is not the base model of {recipe.name} but one trained further",
            seen=f"the name {name}",
            allowed=f"{what}: the delta adds up with nothing else",
            fix=advice,
        )
    num_off, num_compared = _count_inexact(delta, base)
    if num_off > _MOST * num_compared:
        logger.warning(
            "whether %s is the base that the delta was made from cannot be told: "
            "the delta is finer than float16",
            base.folder,
        )
    elif num_off > _FEW * num_compared:
        dtype = base.weights[_FINAL_NORM].dtype
        raise CheckpointError(
            f"{base.folder} is not the model that the delta of {recipe.name} was made from",
            seen=f"{num_off / num_compared:.2%} of {num_compared} sums of delta and base ({dtype}) "
            "are no float16 numbers",
            allowed=f"{what}, number for number: then all of them are",
            fix=advice,
        )


def _count_inexact(delta: Mapping[str, Weight], base: LanguageModel) -> tuple[int, int]:
    """How many of the sums are no float16 numbers, though they must be; and how many there are."""
    last = base.shape.num_layers - 1
    num_off = num_compared = 0
    for layer in sorted({0, last // 2, last}):
        for name in _SAMPLED:
            key = f"decoder.layers.{layer}.{name}"
            if delta[key].dtype == "BF16":
                continue
            ours, theirs = (
                # The first rows; float64 holds sums of float16 numbers exactly.
                rows(weight, 0, min(weight.shape[0], max(1, _SAMPLE_SIZE // weight.shape[1])))
                .load()
                .double()
                for weight in (delta[key], base.weights[key])
            )
            counted = (ours != 0) & (2 * ours.abs() <= theirs.abs())
            total = (ours + theirs)[counted]
            num_off += int((total.to(torch.float16).double() != total).sum())
            num_compared += total.numel()
    return num_off, num_compared
