"""The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL on one canvas.

All that depends on the canvas is a constant. Patches stay in raster order from the first layer to
the last; windows are cut out of the plane by reshaping it, and what belongs to a token is joined
behind the layers.

Shape letters: I images, R rows and C columns of patches, P = R * C, N visual tokens, J patches to a
token, D width, d head width, T taps, W windows, Q patches of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from gap_export.families.common.modules.attention import (
    Rotation,
    mask_bias,
    rope_frequencies,
    rotate,
)
from gap_export.families.common.modules.joining import join_patches
from gap_export.families.common.modules.norms import RmsNorm
from gap_export.families.common.modules.pruned_vision import VisionFeatures
from gap_export.families.qwen_vl.configs import TOWER_ROPE_THETA
from gap_export.spec.architecture import Architecture, VisionShape


@dataclass(frozen=True, kw_only=True)
class TowerKind:
    """What tells the towers apart beside their sizes.

    Attributes:
        gated: Whether norms are RMSNorm and MLPs have a gate (Qwen2.5-VL), or they are CLIP's.
        patch_bias: Whether the patch projection has a bias (Qwen3-VL).
    """

    gated: bool = False
    patch_bias: bool = False


class QwenVisionTower(nn.Module):
    """The tower without the norm behind it, which belongs to the merger.

    Args:
        architecture: The model's.
        kind: Which of the towers it is.
        num_layers: How many layers to run.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    window_keys: torch.Tensor

    def __init__(self, architecture: Architecture, *, kind: TowerKind, num_layers: int) -> None:
        super().__init__()
        shape = architecture.vision
        self.grid, self.joined = shape.patch_grid, architecture.joined_patches
        self.taps = shape.taps
        self.takes_canvas = bool(shape.grids)
        self.embeddings = _Embeddings(shape, kind)
        self.encoder = _Encoder(shape, kind, num_layers=num_layers)
        # Not in any checkpoint: their values are tower_constants.
        for name, value in tower_constants(architecture).items():
            empty = torch.empty(value.shape, dtype=value.dtype)
            self.register_buffer(name, empty, persistent=False)

    def forward(
        self, pixel_values: torch.Tensor, canvas: torch.Tensor | None = None
    ) -> VisionFeatures:
        """Features of joined patches, behind the last layer and behind those of the taps.

        A token's key is those of its patches, side by side, before RoPE turns them: by content,
        not by place.

        Args:
            pixel_values: float [I, 3, h, w].
            canvas: int64 [1], where there are several: which of them the tokens are of.

        Returns:
            patches [I, N, (1 + T) * J * D], keys [I, N, J * d], received_attention [I, N].
        """
        hidden = self.embeddings(pixel_values, canvas)
        images, patches, width = hidden.shape
        cos, sin = (_of_canvas(part, canvas).to(hidden.dtype) for part in (self.cos, self.sin))
        rotation = cos, sin
        bias = self._window_bias(images)
        flat = hidden.reshape(-1, width)
        tapped, attended = [], None
        for index, layer in enumerate(self.encoder.layers):
            flat, attended = layer(flat, images, rotation, bias)
            if index in self.taps:
                tapped.append(flat)
        assert attended is not None and attended.weights is not None, "the last layer sees all"
        planes = [self._joined(one.reshape(images, patches, width)) for one in (flat, *tapped)]
        received = attended.weights.mean(dim=(1, 2))
        return VisionFeatures(
            patches=torch.cat([plane.flatten(2) for plane in planes], dim=2),
            keys=self._joined(attended.keys.mean(dim=1)).flatten(2),
            received_attention=self._joined(received).mean(dim=2),
        )

    def _window_bias(self, images: int) -> torch.Tensor | None:
        """[I * W, 1, 1, Q], blocks what is beyond the canvas; None where no window reaches there.

        Made for all layers at once.
        """
        inside = getattr(self, "window_keys", None)
        if inside is None:
            return None
        return mask_bias(inside.expand(images, -1, -1, -1, -1).reshape(-1, *inside.shape[1:]))

    def _joined(self, per_patch: torch.Tensor) -> torch.Tensor:
        """[I, P, ...] to [I, N, J, ...]."""
        return join_patches(per_patch, self.grid, self.joined)


def tower_constants(architecture: Architecture) -> dict[str, torch.Tensor]:
    """Buffers of a tower by name.

    ``cos`` and ``sin`` are float32 [P, d], with several canvases [C, P, d]: of the head's d / 2
    pairs the first half turns by the patch's row, the second by its column. ``window_keys``, bool
    [W, 1, 1, Q], is there where windows reach over the edge of the canvas, and False for what is
    beyond it.
    """
    shape = architecture.vision
    rows, cols = shape.patch_grid
    inv_freq = rope_frequencies(TOWER_ROPE_THETA, shape.width // shape.num_heads // 2)
    places = torch.stack(
        [
            patch_places((rows, cols), architecture.joined_patches, grid)
            for grid in shape.grids or (architecture.token_grid,)
        ]
    )
    half = (places[..., None].to(torch.float32) * inv_freq).flatten(2)
    angles = torch.cat((half, half), dim=2)
    if not shape.grids:
        angles = angles[0]
    found = {"cos": angles.cos(), "sin": angles.sin()}
    if shape.window_size is not None:
        windows = Windows.of(shape, shape.window_size)
        if windows.overhang != (0, 0):
            inside = torch.ones(1, 1, rows * cols, 1, dtype=torch.int32, device="cpu")
            found["window_keys"] = windows.cut(inside).reshape(-1, 1, 1, windows.side**2) != 0
    return found


def patch_places(
    patches: tuple[int, int], joined: tuple[int, int], grid: tuple[int, int]
) -> torch.Tensor:
    """Where on its own canvas each patch is, whose tokens are laid on another one by one.

    Args:
        patches: R and C of the canvas that is laid on.
        joined: Rows and columns of patches in a token.
        grid: Rows and columns of tokens of the canvas that patches are of.

    Returns:
        int64 [P, 2], row and column, P in raster order of the canvas that is laid on.
    """
    (rows, cols), (down, across) = patches, joined
    place = torch.arange(rows * cols, device="cpu")
    row, col = place // cols, place % cols
    token = row // down * (cols // across) + col // across
    own = (token // grid[1] * down + row % down, token % grid[1] * across + col % across)
    return torch.stack(own, dim=1)


def _of_canvas(several: torch.Tensor, canvas: torch.Tensor | None) -> torch.Tensor:
    """[C, P, ...] to [P, ...]; what is of one canvas alone stays."""
    return several if canvas is None else several.index_select(0, canvas)[0]


class Windows(NamedTuple):
    """Squares of patches that see each other alone.

    Attributes:
        rows: R.
        cols: C.
        side: Patches along a side of a window; Q is its square.
    """

    rows: int
    cols: int
    side: int

    @classmethod
    def of(cls, shape: VisionShape, pixels: int) -> Windows:
        """Windows of so many pixels' side, from the upper left corner of the canvas."""
        rows, cols = shape.patch_grid
        return cls(rows=rows, cols=cols, side=pixels // shape.patch_size)

    @property
    def overhang(self) -> tuple[int, int]:
        """By how many rows and columns the last windows reach over the edge."""
        return -self.rows % self.side, -self.cols % self.side

    def cut(self, heads: torch.Tensor) -> torch.Tensor:
        """[I, heads, P, d] to [I * W, heads, Q, d]; beyond the edge stands 0."""
        images, num_heads, _, width = heads.shape
        down, right = self.overhang
        plane = heads.reshape(images, num_heads, self.rows, self.cols, width)
        if down or right:
            plane = nn.functional.pad(plane, (0, 0, 0, right, 0, down))
        side, (rows, cols) = self.side, self._counts()
        windows = plane.reshape(images, num_heads, rows, side, cols, side, width)
        return windows.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, num_heads, side * side, width)

    def join(self, windows: torch.Tensor) -> torch.Tensor:
        """[I * W, heads, Q, d] back to [I, heads, P, d]."""
        _, num_heads, _, width = windows.shape
        side, (rows, cols) = self.side, self._counts()
        plane = windows.reshape(-1, rows, cols, num_heads, side, side, width)
        plane = plane.permute(0, 3, 1, 4, 2, 5, 6)
        plane = plane.reshape(-1, num_heads, rows * side, cols * side, width)
        inside = plane[:, :, : self.rows, : self.cols]
        return inside.reshape(-1, num_heads, self.rows * self.cols, width)

    def _counts(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return -(-self.rows // self.side), -(-self.cols // self.side)


class _Attended(NamedTuple):
    """What a layer's attention computed on the way.

    Attributes:
        weights: float [I, heads, P, P], query by key; None where the layer sees windows.
        keys: float [I, heads, P, d], before RoPE.
    """

    weights: torch.Tensor | None
    keys: torch.Tensor


class _Embeddings(nn.Module):
    """Patches with their learned positions, where the tower has some.

    The weight of the projection is the sum over the two frames of the checkpoint's: an image that
    stands still is the same frame twice.
    """

    def __init__(self, shape: VisionShape, kind: TowerKind) -> None:
        super().__init__()
        patch = shape.patch_size
        self.patch_embedding = nn.Conv2d(
            3, shape.width, kernel_size=patch, stride=patch, bias=kind.patch_bias
        )
        self.has_table = shape.position_side is not None
        self.num_canvases = max(1, len(shape.grids))
        if self.has_table:
            number = self.num_canvases * shape.num_patches
            self.position_embedding = nn.Embedding(number, shape.width)

    def forward(
        self, pixel_values: torch.Tensor, canvas: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float [I, 3, h, w] to [I, P, D]."""
        patches: torch.Tensor = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        if self.has_table:
            table = self.position_embedding.weight
            if canvas is not None:
                table = table.reshape(self.num_canvases, -1, table.shape[1])
            patches = patches + _of_canvas(table, canvas)
        return patches


class _Encoder(nn.Module):
    """The stack of layers, by the name that all towers have it under."""

    def __init__(self, shape: VisionShape, kind: TowerKind, *, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [_Layer(shape, kind, index=index) for index in range(num_layers)]
        )


class _Layer(nn.Module):
    def __init__(self, shape: VisionShape, kind: TowerKind, *, index: int) -> None:
        super().__init__()
        norm = RmsNorm if kind.gated else nn.LayerNorm
        self.norm1 = norm(shape.width, eps=shape.layer_norm_eps)
        self.attn = _Attention(shape, index=index)
        self.norm2 = norm(shape.width, eps=shape.layer_norm_eps)
        self.mlp = _GatedMlp(shape) if kind.gated else _Mlp(shape)

    def forward(
        self, hidden: torch.Tensor, images: int, rotation: Rotation, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, _Attended]:
        """[I * P, D] to the same, and what attention saw."""
        mixed, attended = self.attn(self.norm1(hidden), images, rotation, bias)
        hidden = hidden + mixed
        return hidden + self.mlp(self.norm2(hidden)), attended


class _Attention(nn.Module):
    def __init__(self, shape: VisionShape, *, index: int) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.windows = None
        if shape.window_size is not None and index not in shape.full_attention:
            self.windows = Windows.of(shape, shape.window_size)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(
        self, hidden: torch.Tensor, images: int, rotation: Rotation, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, _Attended]:
        width = hidden.shape[1]
        query, key, value = (self._heads(part, images) for part in self.qkv(hidden).chunk(3, dim=1))
        unturned = key
        query, key = rotate(query, rotation), rotate(key, rotation)
        windows, weights = self.windows, None
        if windows is None:
            mixed, weights = _mix(query, key, value, None)
        else:
            query, key, value = (windows.cut(part) for part in (query, key, value))
            mixed = windows.join(_mix(query, key, value, bias)[0])
        mixed = mixed.transpose(1, 2).reshape(-1, width)
        return self.proj(mixed), _Attended(weights, unturned)

    def _heads(self, part: torch.Tensor, images: int) -> torch.Tensor:
        """[I * P, D] to [I, heads, P, d]."""
        width = part.shape[1]
        heads = part.reshape(images, -1, self.num_heads, width // self.num_heads)
        return heads.transpose(1, 2)


def _mix(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, heads, S, d]: the mixed values, and weights [B, heads, S, S]."""
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[3] ** -0.5
    # Cast first: softmax's own dtype argument is exported as a cast of its result.
    wide = scores.to(torch.float32)
    wide = wide if bias is None else wide + bias
    weights = torch.softmax(wide, dim=-1).to(scores.dtype)
    return torch.matmul(weights, value), weights


class _Mlp(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.width)
        self.act = ACT2FN[shape.activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.fc2(self.act(self.fc1(hidden)))
        return projected


class _GatedMlp(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.intermediate_size)
        self.up_proj = nn.Linear(shape.width, shape.intermediate_size)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.width)
        self.act = ACT2FN[shape.activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gated = self.act(self.gate_proj(hidden)) * self.up_proj(hidden)
        projected: torch.Tensor = self.down_proj(gated)
        return projected
