"""Norms that PyTorch has not in the form that checkpoints were trained with."""

from __future__ import annotations

import torch
from torch import nn


class RmsNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., H]."""
        wide = hidden.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(hidden.dtype)
