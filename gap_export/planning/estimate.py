"""From counted work to time and memory: the roofline, and what each part of memory rests on.

A product takes as long as its arithmetic or its bytes, whichever is more (Williams et al., 2009,
"Roofline"). What of a device's peaks programs reach is a range; a benchmark on the device narrows
it, see :mod:`gap_export.planning.calibrate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gap_export.planning.counting import Cost
from gap_export.planning.devices import Device
from gap_export.planning.results import DECODE, PREFILL, TOWER, Estimate
from gap_export.spec.requests import BLOCK_SIZE

_GB = 1e9
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# By how much a fitted figure may be off, both ways: the worst of docs/results/plan.md, rounded up.
_FITTED = 0.4
# Buffers of the largest operator's size that live at once.
_LIVE = (1, 4)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the weights of a model are held.

    Attributes:
        dtype: As ``--dtype`` has it.
        floats: Dtype of what is no 4-bit integer, and of what is computed.
        packed: Names of the decoder's weights that are.
        sizes: Numbers in each weight, by component.
    """

    dtype: str
    floats: str
    packed: frozenset[str]
    sizes: Mapping[str, Mapping[str, int]]

    def kind(self, stage: str) -> str:
        """What a stage multiplies: its floats, or 4-bit weights with them."""
        if stage == TOWER or self.dtype == self.floats:
            return self.floats
        return f"{self.dtype} and {self.floats}"

    def bytes_of(self, name: str | None, size: int) -> float:
        """Bytes of a weight of the decoder or of any other component."""
        if name in self.packed:
            # Half a byte, and a scale for each block.
            return size * (0.5 + _BYTES[self.floats] / BLOCK_SIZE)
        return size * _BYTES[self.floats]

    def total(self) -> float:
        """Bytes of all weights."""
        return sum(
            self.bytes_of(name if component == "decoder_model_merged" else None, size)
            for component, sizes in self.sizes.items()
            for name, size in sizes.items()
        )


def roofline_s(
    cost: Cost, weights: Weights, device: Device, *, compute: float = 1.0, bandwidth: float = 1.0
) -> float:
    """Seconds of one run where these shares of the peaks are reached.

    Args:
        cost: What it does.
        weights: What is read.
        device: Its peaks.
        compute: Share of the rate of products.
        bandwidth: Share of the memory's.
    """
    rate = device.rate(weights.floats) * compute
    speed = device.bandwidth_gb_s * _GB * bandwidth
    moved = _BYTES[weights.floats]
    return sum(
        max(
            2 * one.multiply_adds / rate,
            (weights.bytes_of(one.weight, one.weight_size) + one.moved * moved) / speed,
        )
        for one in cost.products
    )


def stage_time(stage: str, cost: Cost, weights: Weights, device: Device) -> Estimate:
    """Milliseconds of one run of a stage."""
    fit = device.fits.get(f"{stage} {weights.kind(stage)}")
    if fit is not None:
        likely = 1e3 * roofline_s(cost, weights, device) / fit.share + fit.step_us / 1e3
        return Estimate(
            low=likely * (1 - _FITTED),
            likely=likely,
            high=likely * (1 + _FITTED),
            basis=f"fitted to {fit.num_rows} bundles that were measured",
        )
    shares = zip(device.reached.compute, device.reached.bandwidth, strict=True)
    slow, likely, fast = (
        1e3 * roofline_s(cost, weights, device, compute=one, bandwidth=two) for one, two in shares
    )
    return Estimate(low=fast, likely=likely, high=slow, basis=device.reached.source)


def answer_times(
    costs: Mapping[str, Cost], weights: Weights, device: Device, *, answer_tokens: int
) -> dict[str, Estimate]:
    """Milliseconds by stage, of one token of decode, and in all.

    Args:
        costs: By stage.
        weights: How they are held.
        device: Where.
        answer_tokens: Tokens of an answer; the first comes with prefill.
    """
    times = {name: stage_time(name, cost, weights, device) for name, cost in costs.items()}
    total = times[TOWER] + times[PREFILL] + times[DECODE] * (answer_tokens - 1)
    return {**times, "total": total}


def memory_of(
    costs: Mapping[str, Cost],
    weights: Weights,
    device: Device,
    *,
    cache_bytes_a_token: Mapping[str, int],
    prompt_tokens: int,
    new_tokens: int,
) -> dict[str, Estimate]:
    """Bytes by part, and in all.

    Args:
        costs: By stage.
        weights: How they are held.
        device: Where.
        cache_bytes_a_token: Of keys and values of one token, by dtype of floats.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Most tokens of an answer.
    """
    held, cache = weights.total(), cache_bytes_a_token[weights.floats]
    largest = max(cost.largest for cost in costs.values())
    # ONNX Runtime packs weights anew for its kernels, and may keep both.
    again = 1.0 if device.target is None else 0.0
    low, high = device.runtime_gb
    parts = {
        "weights": _range(held, held * (1 + again), "every weight of the model, in its dtype")
        if again
        else _range(held, held, "every weight of the model, in its dtype"),
        "kv_cache": _range(
            cache * (prompt_tokens + 1),
            cache * (prompt_tokens + new_tokens),
            "the prompt alone, to the longest answer",
        ),
        "activations": _range(
            largest * _LIVE[0],
            largest * _LIVE[1],
            "what the largest operator reads and writes, once, to four such at a time",
        ),
        "workspace": _range(0.0, 0.25 * _GB, "assumed: scratch memory of kernels"),
        "runtime": _range(low * _GB, high * _GB, device.runtime_source),
    }
    total = Estimate(low=0.0, likely=0.0, high=0.0)
    for part in parts.values():
        total = total + part
    return {**parts, "total": total}


def _range(low: float, high: float, basis: str) -> Estimate:
    return Estimate(low=low, likely=(low + high) / 2, high=high, basis=basis)
