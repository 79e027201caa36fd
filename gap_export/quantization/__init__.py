"""What quantizing weights needs to know of a model: its linear layers, and what goes into them."""

from __future__ import annotations

from gap_export.quantization.awq import ChannelScale, find_scales, scale_channels
from gap_export.quantization.calibration import loaded
from gap_export.quantization.linears import linear_keys

__all__ = ["ChannelScale", "find_scales", "linear_keys", "loaded", "scale_channels"]
