"""What tells the demo models apart: tower, tokens, prompt and the way a box is said.

Each is its family in small: the same parts in the same places as in the model it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes import IMAGE_SIZE
from gap_export.spec.positions import VisualSpan, unpruned_ids
from refshapes_training.cells import Cells, tiles_and_thumbnail, whole_image

Tower = Literal["clip", "eva", "qwen3_vl", "internvl"]

NUM_BINS = 101
"""Values 0.00 to 1.00 that a coordinate's first token can say."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One token of an answer.

    Attributes:
        texts: What it may say, in order.
        corner: Which of x1, y1, x2, y2 it speaks of; None for punctuation.
        unit: What one step in `texts` is worth, as a fraction of the image.
    """

    texts: tuple[str, ...]
    corner: int | None = None
    unit: float = 0.0

    @property
    def is_first(self) -> bool:
        """Whether it holds the leading digits of a coordinate."""
        return self.corner is not None and len(self.texts) == NUM_BINS


def _bins(left: str, right: str, *, percent: bool = False) -> tuple[str, ...]:
    values = (str(v) if percent else f"{v / 100:.2f}" for v in range(NUM_BINS))
    return tuple(f"{left}{value}{right}" for value in values)


def _bracketed(*, thousandths: bool) -> tuple[Slot, ...]:
    """LLaVA's `[0.12, 0.34, 0.56, 0.78]`, or Shikra's `[0.123,0.345,0.567,0.789]`."""
    if not thousandths:
        forms = (("[", ","), ("", ","), ("", ","), ("", "]"))
        return tuple(
            Slot(texts=_bins(left, right), corner=corner, unit=0.01)
            for corner, (left, right) in enumerate(forms)
        )
    slots = []
    for corner, left in enumerate(("[", ",", ",", ",")):
        slots.append(Slot(texts=_bins(left, ""), corner=corner, unit=0.01))
        slots.append(Slot(texts=tuple("0123456789"), corner=corner, unit=0.001))
    return (*slots, Slot(texts=("]",)))


def _angled() -> tuple[Slot, ...]:
    """MiniGPT-v2's `{<12><34><56><78>}`, whole numbers of a hundredth."""
    forms = (("{<", ">"), ("<", ">"), ("<", ">"), ("<", ">}"))
    return tuple(
        Slot(texts=_bins(left, right, percent=True), corner=corner, unit=0.01)
        for corner, (left, right) in enumerate(forms)
    )


def _thousandths(before: str, between: str, behind: str) -> tuple[Slot, ...]:
    """Whole thousandths, two leading digits and the last one: `12` and `3`."""
    slots = []
    for corner, left in enumerate((before, between, between, between)):
        slots.append(Slot(texts=_bins(left, "", percent=True), corner=corner, unit=0.01))
        slots.append(Slot(texts=tuple("0123456789"), corner=corner, unit=0.001))
    return (*slots, Slot(texts=(behind,)))


def _json() -> tuple[Slot, ...]:
    """Qwen3-VL's `{"bbox_2d":[123,345,567,789]}`."""
    return (Slot(texts=('{"bbox_2d":',)), *_thousandths("[", ",", "]}"))


def _double_bracketed() -> tuple[Slot, ...]:
    """InternVL's `<box>[[123,345,567,789]]</box>`."""
    return (Slot(texts=("<box>",)), *_thousandths("[[", ",", "]]"), Slot(texts=("</box>",)))


@dataclass(frozen=True, kw_only=True)
class Design:
    """One demo model.

    Attributes:
        name: Folder of the checkpoint.
        tower: `clip`: [CLS], a norm before the first layer, the last layer but one is read;
            `eva`: a biased patch projection, no norm in front, the norm behind the last layer is
            read, and neighbours in a row are one token; `qwen3_vl`: no [CLS] and no learned
            positions, rotary ones in attention, states of earlier layers handed on (DeepStack);
            `internvl`: as `eva`, with layer scale, and no norm behind.
        patch_size: In pixels.
        join: Rows and columns of patches in a token.
        projector: `mlp` of two layers, `linear`, Qwen's `merger`, or `internvl`'s.
        decoder: Whose decoder it is.
        canvas: Height and width in pixels that the image is squashed to.
        tile: Pixels of the side of the tiles that the canvas is cut into, the whole image squashed
            to one behind them; None where it is not cut.
        taps: Layers of the tower whose states are handed on.
        before: Prompt tokens before the image, `<s>` first.
        behind: Prompt tokens between the image and the expression.
        asking: Prompt tokens behind the expression.
        answer: What is said, token by token, `</s>` not counted.
        markers: Tokens of the vocabulary that are no words, `<s>` and `</s>` not counted.
        spaced: Whether the tokens of an answer are written with spaces between.
        starts_from: Demo model whose decoder, words and tower it starts from; None: from nothing.
        has_text_tower: Whether a text tower that fits the vision tower comes with it.
    """

    name: str
    tower: Tower
    patch_size: int
    join: tuple[int, int]
    projector: Literal["mlp", "linear", "merger", "internvl"]
    decoder: Literal["llama", "qwen2", "qwen3_vl"] = "llama"
    before: tuple[str, ...]
    behind: tuple[str, ...]
    asking: tuple[str, ...]
    answer: tuple[Slot, ...]
    markers: tuple[str, ...]
    spaced: bool
    starts_from: str | None
    has_text_tower: bool
    canvas: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
    tile: int | None = None
    taps: tuple[int, ...] = ()

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in what the tower sees at a time."""
        height, width = self.canvas if self.tile is None else (self.tile, self.tile)
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> Cells:
        """The patches of an image, as the tower sees them."""
        return self._cells((1, 1))

    @property
    def tokens(self) -> Cells:
        """The visual tokens of an image, as they are fed."""
        return self._cells(self.join)

    def _cells(self, joined: tuple[int, int]) -> Cells:
        rows, cols = (side // join for side, join in zip(self.patch_grid, joined, strict=True))
        if self.tile is None:
            return whole_image(rows, cols)
        return tiles_and_thumbnail(
            rows, cols, self.canvas[0] // self.tile, self.canvas[1] // self.tile
        )

    @property
    def num_tokens(self) -> int:
        """N, visual tokens of an image."""
        return len(self.tokens.order)

    @property
    def position_axes(self) -> int:
        """Numbers that a position is made of."""
        return 3 if self.decoder == "qwen3_vl" else 1

    @property
    def visual_start(self) -> int:
        """Index of the first visual token."""
        return len(self.before)

    @property
    def visual_end(self) -> int:
        """Index behind the last visual token."""
        return len(self.before) + self.num_tokens

    @property
    def prefix_length(self) -> int:
        """Tokens that all questions about an image share."""
        return self.visual_end + len(self.behind)

    def prefix_ids(self) -> NDArray[np.int64]:
        """Position ids of these tokens and of the one behind them; int64 [A, prefix + 1]."""
        grid = self.tokens.grids[0]
        span = VisualSpan(
            start=self.visual_start,
            num_visual_tokens=self.num_tokens,
            keep_indices=np.arange(self.num_tokens),
            grid=grid if self.position_axes > 1 else None,
        )
        return unpruned_ids(self.prefix_length + 1, [span], position_axes=self.position_axes)


LLAVA = Design(
    name="refshapes-llava",
    tower="clip",
    patch_size=8,
    join=(1, 1),
    projector="mlp",
    before=("<s>", "USER:"),
    behind=(),
    asking=("ASSISTANT:",),
    answer=_bracketed(thousandths=False),
    markers=("<image>", "USER:", "ASSISTANT:"),
    spaced=True,
    starts_from=None,
    has_text_tower=True,
)

SHIKRA = Design(
    name="refshapes-shikra",
    tower="clip",
    patch_size=8,
    join=(1, 1),
    projector="linear",
    before=("<s>", "USER:", "In", "the", "given", "<im_start>"),
    behind=("<im_end>", "could", "you", "find", "and", "tell", "me", "the", "coordinates", "of"),
    asking=("?", "ASSISTANT:"),
    answer=_bracketed(thousandths=True),
    markers=("<im_patch>", "<im_start>", "<im_end>", "USER:", "ASSISTANT:"),
    spaced=False,
    starts_from="refshapes-llava",
    has_text_tower=True,
)

MINIGPT_V2 = Design(
    name="refshapes-minigpt-v2",
    tower="eva",
    patch_size=6,
    join=(1, 4),
    projector="linear",
    # Twice, as MiniGPT-v2: the tokenizer's own and the template's.
    before=("<s>", "<s>", "[INST]", "<Img>"),
    behind=("</Img>", "[refer]", "give", "me", "the", "location", "of"),
    asking=("[/INST]",),
    answer=_angled(),
    markers=("[INST]", "[/INST]", "<Img>", "</Img>", "[refer]"),
    spaced=False,
    starts_from="refshapes-llava",
    has_text_tower=False,
)

QWEN3_VL = Design(
    name="refshapes-qwen3-vl",
    tower="qwen3_vl",
    # 9 rows of 12 tokens: not square, so that rows and columns cannot be mistaken unseen.
    canvas=(108, 144),
    patch_size=6,
    join=(2, 2),
    taps=(0, 1),
    projector="merger",
    decoder="qwen3_vl",
    before=("<|im_start|>", "user", "<|vision_start|>"),
    behind=("<|vision_end|>", "Locate"),
    asking=("in", "JSON", "<|im_end|>", "<|im_start|>", "assistant"),
    answer=_json(),
    markers=(
        "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>",
    ),
    spaced=False,
    starts_from="refshapes-llava",
    has_text_tower=False,
)  # fmt: skip

INTERNVL = Design(
    name="refshapes-internvl",
    tower="internvl",
    # Two rows of three tiles, and the thumbnail: 112 tokens.
    canvas=(96, 144),
    tile=48,
    patch_size=6,
    join=(2, 2),
    projector="internvl",
    decoder="qwen2",
    before=("<|im_start|>", "user", "<img>"),
    behind=("</img>", "locate", "<ref>"),
    asking=("</ref>", "<|im_end|>", "<|im_start|>", "assistant"),
    answer=_double_bracketed(),
    markers=(
        "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>",
        "<box>", "</box>",
    ),
    spaced=False,
    starts_from="refshapes-llava",
    has_text_tower=False,
)  # fmt: skip

DESIGNS: Mapping[str, Design] = {d.name: d for d in (LLAVA, SHIKRA, MINIGPT_V2, QWEN3_VL, INTERNVL)}
