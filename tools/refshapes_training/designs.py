"""What tells the demo models apart: tower, tokens, prompt and the way a box is said.

Each is its family in small: the same parts in the same places as in the model it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gap_export.evaluation.refshapes import IMAGE_SIZE

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


@dataclass(frozen=True, kw_only=True)
class Design:
    """One demo model.

    Attributes:
        name: Folder of the checkpoint.
        tower: `clip`: [CLS], a norm before the first layer, the last layer but one is read;
            `eva`: a biased patch projection, no norm in front, the norm behind the last layer is
            read, and `join` neighbours in a row are one token.
        patch_size: In pixels.
        join: Patches to a token.
        projector: `mlp` of two layers, or `linear`.
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
    tower: Literal["clip", "eva"]
    patch_size: int
    join: int
    projector: Literal["mlp", "linear"]
    before: tuple[str, ...]
    behind: tuple[str, ...]
    asking: tuple[str, ...]
    answer: tuple[Slot, ...]
    markers: tuple[str, ...]
    spaced: bool
    starts_from: str | None
    has_text_tower: bool

    @property
    def patch_side(self) -> int:
        """Patches along one side."""
        return IMAGE_SIZE // self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.patch_side, self.patch_side // self.join

    @property
    def num_tokens(self) -> int:
        """N, visual tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def visual_start(self) -> int:
        """Position id of the first visual token."""
        return len(self.before)

    @property
    def visual_end(self) -> int:
        """Position id behind the last visual token."""
        return len(self.before) + self.num_tokens

    @property
    def prefix_length(self) -> int:
        """Tokens that all questions about an image share."""
        return self.visual_end + len(self.behind)


LLAVA = Design(
    name="refshapes-llava",
    tower="clip",
    patch_size=8,
    join=1,
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
    join=1,
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
    join=4,
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

DESIGNS: Mapping[str, Design] = {d.name: d for d in (LLAVA, SHIKRA, MINIGPT_V2)}
