"""The reference of a bundle with a tower of 8-bit integers: PyTorch that rounds as its graph does.

What rounding costs is a matter of accuracy, which ``eval`` measures. Whether a graph computes what
its manifest says is another question, and answered by comparison with the same integers.
"""

from __future__ import annotations

import torch
from torch import nn

from gap_export.checkpoint.weights import round_to_int8
from gap_export.exporting.quantization.tower import TOWER, tower_keys
from gap_export.families import Reference

_LARGEST = 255


def use_int8_tower(reference: Reference) -> None:
    """Have the tower's layers compute with 8-bit integers.

    Args:
        reference: In float32 on the CPU; its tower is changed, and its weights are rounded anew.
    """
    component = reference.component(TOWER)
    for key in tower_keys(component):
        parent, _, name = key.removesuffix(".weight").rpartition(".")
        owner = component.module.get_submodule(parent)
        linear = getattr(owner, name)
        setattr(owner, name, _Int8Linear(linear))


class _Int8Linear(nn.Module):
    """As ONNX's DynamicQuantizeLinear and MatMulInteger compute."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scales = round_to_int8(linear.weight.detach())
        self.values, self.scales, self.bias = values.to(torch.float32), scales, linear.bias
        self.has_bias = linear.bias is not None

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]; all of the input shares one scale and zero point."""
        low, high = given.min().clamp(max=0), given.max().clamp(min=0)
        scale = (high - low) / _LARGEST
        scale = torch.where(scale > 0, scale, 1.0)
        zero = (-low / scale).clamp(0, _LARGEST).round()
        rounded = (given / scale).round().add(zero).clamp(0, _LARGEST) - zero
        # Float32 holds sums of integers up to 2**24 exactly, and rounds the few that are larger.
        product = nn.functional.linear(rounded, self.values) * (scale * self.scales)
        return product + self.bias if self.has_bias else product
