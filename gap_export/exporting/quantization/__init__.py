"""What quantizing weights needs to know of a model: its linear layers, and what goes into them."""

from __future__ import annotations

from gap_export.exporting.quantization.awq import ChannelScale, find_scales, scale_channels
from gap_export.exporting.quantization.calibration import loaded
from gap_export.exporting.quantization.linears import linear_keys
from gap_export.exporting.quantization.scales_file import SCALES_NAME, read_scales, store_scales

__all__ = [
    "SCALES_NAME",
    "ChannelScale",
    "find_scales",
    "linear_keys",
    "loaded",
    "read_scales",
    "scale_channels",
    "store_scales",
]
