"""What every family's vision encoder is: a tower, the pruner behind it, and the projector.

Shape letters: I images, B rows (I is 1 or B), N visual tokens, K kept, K' emitted, D vision
features, C width of a key, E CLIP embedding, H the decoder's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from gap_export.families.common.modules.projector import TappedProjector, embeds_of
from gap_export.pruning import (
    ChoosingPruner,
    FixedPruner,
    Pruner,
    Reading,
    ScoringPruner,
    VisionState,
)
from gap_export.pruning.emit import emit_kept, emit_scored
from gap_export.pruning.extra import CanvasGrid
from gap_export.pruning.select import put_in_order
from gap_export.spec.manifest import GridSpec, PruningSpec


class VisionFeatures(NamedTuple):
    """What a tower gives; None what it has not got, which its family's readings leave out.

    Attributes:
        patches: float [I, N, D], at the select layer, raster order of the grid; with DeepStack a
            plane of features behind the other, see ``ProjectorShape.num_taps``.
        keys: float [I, N, C], of the layer that produced the features, averaged over the heads;
            those of patches that are joined to a token side by side.
        cls: float [I, D], of the CLS token at the select layer.
        cls_attention: float [I, N], attention of CLS to each, averaged over the heads, in the layer
            that produced the features.
        received_attention: float [I, N], attention that each receives in that layer: the mean over
            heads and queries, then over the patches of a token. A function of towers whose graphs
            are older than this reading: nodes that are not read would rename those behind them.
    """

    patches: torch.Tensor
    keys: torch.Tensor | None = None
    cls: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None
    received_attention: torch.Tensor | Callable[[], torch.Tensor] | None = None


class JointSpace(nn.Module):
    """Vision features into CLIP's joint space with texts: final norm, then projection."""

    def __init__(self, *, width: int, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(width, eps=eps)
        self.visual_projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[B, N, D] to [B, N, E]."""
        batch, length, width = patches.shape
        flat = self.post_layernorm(patches.reshape(-1, width))
        embeds: torch.Tensor = self.visual_projection(flat)
        return embeds.reshape(batch, length, -1)


class NextLayer(nn.Module):
    """As much of the tower's layer behind the select layer as PruMerge reads.

    That is all keys, and the query of CLS alone; the other queries, the values and the MLP are not
    there.
    """

    def __init__(self, *, width: int, eps: float) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)

    def forward(self, features: VisionFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of CLS to each patch [I, N], as one head of width D, and keys [I, N, D]."""
        assert features.cls is not None, "read from towers with CLS alone"
        hidden = torch.cat([features.cls[:, None], features.patches], dim=1)
        batch, length, width = hidden.shape
        query = self.q_proj(self.layer_norm1(features.cls))[:, :, None]
        keys = self.k_proj(self.layer_norm1(hidden.reshape(-1, width)))
        keys = keys.reshape(batch, length, width)
        scores = torch.matmul(keys, query)[:, :, 0] * width**-0.5
        return torch.softmax(scores.to(torch.float32), dim=-1)[:, 1:], keys[:, 1:]


class VisionParts(NamedTuple):
    """What a vision encoder is made of, but for the projector.

    Attributes:
        tower: pixel_values to :class:`VisionFeatures`.
        joint_space: None unless the pruner reads the text in it.
        next_layer: None unless the pruner reads it.
        pruner: Who survives.
        pruning: How many, in which order, with which extra token.
        num_canvases: C, where the tower is told which of several canvases an image is on.
    """

    tower: nn.Module
    joint_space: JointSpace | None
    next_layer: NextLayer | None
    pruner: Pruner
    pruning: PruningSpec
    num_canvases: int = 0


class _VisionReader(nn.Module):
    """From an image to what the pruner reads."""

    places: torch.Tensor
    rope_sums: torch.Tensor

    def __init__(self, parts: VisionParts) -> None:
        super().__init__()
        self.tower = parts.tower
        self.joint_space = parts.joint_space
        self.next_layer = parts.next_layer
        self.pruner = parts.pruner
        self.pruning = parts.pruning
        self.takes_canvas = bool(getattr(parts.tower, "takes_canvas", False))
        self._each = (parts.num_canvases,) if self.takes_canvas else ()
        for name, dtype in (("places", torch.int64), ("rope_sums", torch.float32)):
            if name in parts.pruner.reads:
                shape = (*self._each, parts.pruning.num_visual_tokens, 2)
                self.register_buffer(name, torch.empty(shape, dtype=dtype), persistent=False)

    def _of_grid(
        self, reading: Literal["places", "rope_sums"], beside: Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        """[N, 2] of the grid, or of the canvas that images are on; None where it is not read."""
        if reading not in self.pruner.reads:
            return None
        constant: torch.Tensor = getattr(self, reading)
        return constant.index_select(0, beside[-1])[0] if self.takes_canvas else constant

    def _state(
        self,
        pixel_values: torch.Tensor,
        beside: Sequence[torch.Tensor],
        projector: nn.Module | None,
    ) -> VisionState:
        """What the pruner reads, one row for each of B (of I, where no text is read).

        ``beside`` are the texts, if the pruner reads them, then the canvas, if there are several.
        """
        dtype = next(self.parameters()).dtype
        split = len(beside) - self.takes_canvas
        texts, canvas = beside[:split], beside[split:]
        text_embeds = texts[0] if texts else None
        features: VisionFeatures = self.tower(pixel_values.to(dtype), *canvas)
        patches = features.patches
        next_layer = (None, None) if self.next_layer is None else self.next_layer(features)
        received = features.received_attention
        if callable(received):
            received = received() if "received_attention" in self.pruner.reads else None
        seen: dict[Reading, torch.Tensor | None] = {
            "cls_features": features.cls,
            "cls_attention": features.cls_attention,
            "received_attention": received,
            "keys": features.keys,
            "image_embeds": None if projector is None else embeds_of(projector, patches),
        }
        rows = None if text_embeds is None else text_embeds.shape[0]
        parts = {
            name: None if part is None or name not in self.pruner.reads else per_row(part, rows)
            for name, part in seen.items()
        }
        return VisionState(
            patch_features=per_row(patches, rows),
            cls_features=parts["cls_features"],
            cls_attention=parts["cls_attention"],
            received_attention=parts["received_attention"],
            keys=parts["keys"],
            image_embeds=parts["image_embeds"],
            next_attention=next_layer[0],
            next_keys=next_layer[1],
            patch_embeds=(
                None if self.joint_space is None else per_row(self.joint_space(patches), rows)
            ),
            text_embeds=None if self.joint_space is None else text_embeds,
            word_embeds=text_embeds if "llm_text" in self.pruner.reads else None,
            places=self._of_grid("places", beside),
            rope_sums=self._of_grid("rope_sums", beside),
            text_similarity_sign=self.pruning.text_similarity_sign or 1,
        )


class PrunedVisionEncoder(_VisionReader):
    """Tower, selection, projection of the survivors alone.

    Args:
        parts: What it is made of.
        projector: [..., D] to [..., H].
        grid: Rows and columns of the N tokens.
    """

    fixed_places: torch.Tensor
    canvas_cols: torch.Tensor

    def __init__(self, parts: VisionParts, *, projector: nn.Module, grid: GridSpec) -> None:
        super().__init__(parts)
        self.projector = projector
        self.grid = grid
        if isinstance(parts.pruner, FixedPruner):
            places = torch.empty((*self._each, parts.pruning.num_kept_tokens), dtype=torch.int64)
            self.register_buffer("fixed_places", places, persistent=False)
        if self.takes_canvas and parts.pruning.extra_position == "centroid":
            cols = torch.empty(parts.num_canvases, dtype=torch.int64)
            self.register_buffer("canvas_cols", cols, persistent=False)

    def forward(
        self, pixel_values: torch.Tensor, *beside: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Encode and prune.

        Args:
            pixel_values: float32 [I, 3, h, w], also where weights are of 16 bits.
            *beside: float [B, E or H], where the pruner reads the text; I is then 1 or B. Then,
                where the tower takes several canvases, int64 [1], the number of the images' one.

        Returns:
            image_features [B, K', H], keep_indices int64 [B, K'] and, of a pruner that has scores,
            token_scores float32 [B, N] (B = I without text).
        """
        state = self._state(pixel_values, beside, self._projector_of_all())
        pruning, grid = self.pruning, self._grid_of(beside)
        if isinstance(self.pruner, ScoringPruner):
            scores = self.pruner.scores(state)
            features, keep = emit_scored(
                self.pruner,
                self._emitted(state),
                scores,
                num_kept_tokens=pruning.num_kept_tokens,
                pruning=pruning,
                grid=grid,
                project=self.projector,
            )
            return features, keep, scores.to(torch.float32)
        if isinstance(self.pruner, ChoosingPruner):
            chosen = self.pruner.choose(state, num_kept_tokens=pruning.num_kept_tokens)
            keep = put_in_order(chosen, order=pruning.order)
        else:
            # Of several canvases each has places of its own.
            places = self.fixed_places
            if self.takes_canvas:
                places = places.index_select(0, beside[-1])
            keep = places.expand(state.patch_features.shape[0], -1)
        return emit_kept(
            self._emitted(state), keep, pruning=pruning, grid=grid, project=self.projector
        )

    def _grid_of(self, beside: Sequence[torch.Tensor]) -> GridSpec | CanvasGrid:
        """What the place of an extra token is counted in."""
        if not self.takes_canvas or self.pruning.extra_position != "centroid":
            return self.grid
        return CanvasGrid(cols=self.canvas_cols.index_select(0, beside[-1]))

    def margins(self, pixel_values: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor | None:
        """By how much the closest of a pruner's choices was decided; no part of the graph.

        Args:
            pixel_values: As of :meth:`forward`.
            *beside: As of :meth:`forward`.

        Returns:
            float [B]; None of another pruner, or where the pruner does not know.
        """
        pruner = self.pruner
        if not isinstance(pruner, ChoosingPruner):
            return None
        state = self._state(pixel_values, beside, self._projector_of_all())
        return pruner.margins(state, num_kept_tokens=self.pruning.num_kept_tokens)

    def _projector_of_all(self) -> nn.Module | None:
        """The projector, where the pruner reads all tokens projected."""
        return self.projector if "image_embeds" in self.pruner.reads else None

    def _emitted(self, state: VisionState) -> VisionState:
        """The state to emit from: what is projected already, where that is all of it.

        Of tapped features a pruner reads the first plane alone; survivors are projected anew.
        """
        tapped = isinstance(self.projector, TappedProjector)
        return replace(state, image_embeds=None) if tapped else state


class ScoredVisionEncoder(_VisionReader):
    """Tower and scores; how many survive is decided outside, by what the scores are."""

    def forward(
        self, pixel_values: torch.Tensor, *beside: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Encode and score.

        Args:
            pixel_values: float32 [I, 3, h, w].
            *beside: float [B, E or H], where the pruner reads the text; I is then 1 or B. Then,
                where the tower takes several canvases, int64 [1], the number of the images' one.

        Returns:
            token_scores float32 [B, N], patch_features [B, N, D] and, where the pruner merges,
            patch_keys [B, N, C or D].
        """
        pruner = self.pruner
        assert isinstance(pruner, ScoringPruner), "an image decides by scores"
        state = self._state(pixel_values, beside, None)
        scores = pruner.scores(state).to(torch.float32)
        if pruner.merges_by is None:
            return scores, state.patch_features
        keys = getattr(state, pruner.merges_by)
        return scores, state.patch_features, keys


class TokenPruner(nn.Module):
    """Behind a :class:`ScoredVisionEncoder`: selection and projection of K tokens.

    Args:
        projector: [..., D] to [..., H].
        pruner: Who survives.
        pruning: In which order, with which extra token.
        grid: Rows and columns of the N tokens.
    """

    def __init__(
        self,
        *,
        projector: nn.Module,
        pruner: ScoringPruner,
        pruning: PruningSpec,
        grid: GridSpec,
    ) -> None:
        super().__init__()
        self.projector = projector
        self.pruner = pruner
        self.pruning = pruning
        self.grid = grid

    def forward(
        self,
        kept_slots: torch.Tensor,
        token_scores: torch.Tensor,
        patch_features: torch.Tensor,
        patch_keys: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the best.

        Args:
            kept_slots: int64 [K], read for its length alone; the graph takes the number instead.
            token_scores: float32 [B, N].
            patch_features: [B, N, D].
            patch_keys: [B, N, C or D], where the pruner merges.

        Returns:
            image_features [B, K', H] and keep_indices int64 [B, K'].
        """
        merges_by = self.pruner.merges_by
        state = VisionState(
            patch_features=patch_features,
            keys=patch_keys if merges_by == "keys" else None,
            next_keys=patch_keys if merges_by == "next_keys" else None,
        )
        return emit_scored(
            self.pruner,
            state,
            token_scores,
            num_kept_tokens=kept_slots.shape[0],
            pruning=self.pruning,
            grid=self.grid,
            project=self.projector,
        )


def per_row(per_image: torch.Tensor, num_rows: int | None) -> torch.Tensor:
    """[I, ...] to [B, ...]: the only image for every row, or each row its own.

    Args:
        per_image: I is 1 or B.
        num_rows: B; None leaves everything as it is.
    """
    if num_rows is None:
        return per_image
    rows = torch.arange(num_rows, device=per_image.device)
    return per_image.index_select(0, rows.clamp(max=per_image.shape[0] - 1))
