"""Activation-aware scaling before weights are rounded (AWQ, arXiv 2306.00978).

What an input channel of a linear layer loses by rounding counts as much as the channel is large.
So the weights of large channels are multiplied by s > 1 and round finer, and what comes in is
divided by s, where that costs nothing: in the weight of the norm, or in the rows of the layer,
that the input comes from. The graph is the same, its floats compute the same.

``s = mean|x| ** alpha`` for each channel, with the alpha of a grid for which the layers' outputs,
after rounding, are nearest to what they were; alpha = 0 is plain rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from gap_export.checkpoint.weights import DerivedWeight, Weight, quantize_columns
from gap_export.exporting.quantization.calibration import Observed, observe_inputs
from gap_export.families import Component, Reference
from gap_export.families.common.decoder_kind import ChannelGroup
from gap_export.progress import Progress

_GRID = tuple(step / 10 for step in range(11))
# A channel that is next to silent is not blown up any further: norms stay numbers of float16.
_SMALLEST_SHARE = 1e-4
# Values of a weight that are worked on at a time; a few of that size are in memory.
_PIECE = 1 << 23


@dataclass(frozen=True, kw_only=True)
class ChannelScale:
    """What the channels between modules are scaled by.

    Attributes:
        group: The modules.
        scale: float32 [K], s, finite and above 0; ones where nothing is scaled.
    """

    group: ChannelGroup
    scale: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FoundScale(ChannelScale):
    """A scale, and what it is good for.

    Attributes:
        alpha: 0 where nothing is scaled.
        error: Squared error of the readers' outputs on the calibration rows, relative.
        plain_error: The same with alpha = 0.
    """

    alpha: float
    error: float
    plain_error: float


def find_scales(
    component: Component,
    batches: Iterable[Sequence[torch.Tensor]],
    *,
    block_size: int,
    progress: Progress,
) -> tuple[FoundScale, ...]:
    """Calibrate a decoder.

    Args:
        component: Meta or not; one of its weights is in memory at a time, and what its layers saw.
        batches: See :func:`gap_export.exporting.quantization.calibration.observe_inputs`.
        block_size: Block size of the quantization to come.
        progress: Progress reporter.

    Raises:
        CheckpointError: a weight cannot be read.
        UsageError: there is no sample.
    """
    groups = channel_groups(component)
    with progress.stage("watching calibration samples"):
        observed = observe_inputs(component, [group.readers[0] for group in groups], batches)
    found: list[FoundScale] = []
    with progress.stage("looking for scales", total=len(groups)) as advance:
        for group in groups:
            weights = [component.weight_refs[f"{name}.weight"] for name in group.readers]
            found.append(_search(group, weights, observed.pop(group.readers[0]), block_size))
            advance(1)
    return tuple(found)


def channel_groups(component: Component) -> tuple[ChannelGroup, ...]:
    """What of a decoder can be scaled: the groups of all layers, in the order of the layers."""
    found = []
    layers = component.module.get_submodule(str(component.repeated))
    for index, _ in enumerate(layers.children()):
        for group in component.channel_groups:
            start = f"{component.repeated}.{index}"
            named = replace(
                group,
                readers=tuple(f"{start}.{name}" for name in group.readers),
                producer=f"{start}.{group.producer}",
            )
            rows = component.weight_refs[f"{named.producer}.weight"].shape[0]
            width = component.weight_refs[f"{named.readers[0]}.weight"].shape[1]
            # Fewer channels come out than go in where query heads share values.
            if not group.same_heads or rows == width:
                found.append(named)
    return tuple(found)


def scale_channels(reference: Reference, scales: Iterable[ChannelScale], *, of: str) -> Reference:
    """The same model with scaled weights; they are computed when they are loaded.

    Args:
        reference: On the meta device; its modules are shared with the result.
        scales: From :func:`find_scales`, in its order.
        of: Name of the component they belong to.
    """
    component = reference.component(of)
    refs = dict(component.weight_refs)
    for found in scales:
        if bool((found.scale == 1).all()):
            continue
        for name in found.group.readers:
            times = partial(torch.mul, other=found.scale)
            refs[f"{name}.weight"] = _changed(refs[f"{name}.weight"], times, "input")
        for leaf in ("weight", "bias"):
            key = f"{found.group.producer}.{leaf}"
            if key in refs:
                # Rows of a weight, or elements of a bias or a norm.
                shape = (-1, *(1 for _ in refs[key].shape[1:]))
                by = partial(torch.div, other=found.scale.reshape(shape))
                refs[key] = _changed(refs[key], by, "output")
    scaled = replace(component, weight_refs=refs)
    return replace(
        reference,
        components=tuple(scaled if c.name == of else c for c in reference.components),
    )


def _search(
    group: ChannelGroup, weights: Sequence[Weight], observed: Observed, block_size: int
) -> FoundScale:
    rows, mean = observed.rows, observed.mean_size
    errors = torch.zeros(len(_GRID), dtype=torch.float64)
    size = 0.0
    scales = [_scale(mean, alpha) for alpha in _GRID]
    for weight in weights:
        for floats in _pieces(weight):
            size += _power(rows @ floats.T)
            for index, scale in enumerate(scales):
                steps, sizes = quantize_columns(floats * scale, block_size=block_size)
                lost = (steps * sizes).reshape(floats.shape).div_(scale).sub_(floats)
                errors[index] += _power(rows @ lost.T)
    best = int(errors.argmin())
    whole = size or 1.0
    return FoundScale(
        group=group,
        scale=scales[best],
        alpha=_GRID[best],
        error=float(errors[best]) / whole,
        plain_error=float(errors[0]) / whole,
    )


def _pieces(weight: Weight) -> Iterator[torch.Tensor]:
    """Some rows after the other of a weight [N, K], float32."""
    tensor = weight.load()
    step = max(1, _PIECE // tensor.shape[1])
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step].to(torch.float32)


def _power(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _scale(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """S [K], around 1: what is divided by it neither overflows nor vanishes in float16."""
    largest = float(mean.max())
    if largest == 0:
        return torch.ones_like(mean)
    powers = mean.clamp(min=largest * _SMALLEST_SHARE).pow(alpha)
    return powers / (powers.max() * powers.min()).sqrt()


def _changed(weight: Weight, change: Callable[[torch.Tensor], torch.Tensor], what: str) -> Weight:
    """A weight with its input or output channels scaled; float32."""
    return DerivedWeight(
        dtype="F32",
        shape=weight.shape,
        sources=(weight,),
        compute=lambda tensor: change(tensor.to(torch.float32)),
        origin=f"{weight.origin}, {what} channels scaled",
    )
