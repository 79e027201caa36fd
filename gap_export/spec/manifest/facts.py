"""What recipes and manifests both say of a model: its image, its grid, its prompt, its boxes.

:func:`wrong_facts` is the one place that knows which values make sense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gap_export.spec.manifest.plain import ADDED_LATER, RARE
from gap_export.spec.preparations import (
    DYNAMIC_TILES,
    SHARED,
    TILED,
    WITH_NEWLINE,
    known_preparations,
)

TileCode = Literal["transformers", "authors"]
# A fact's name, what was seen, what is allowed.
WrongFact = tuple[str, object, str]

SLOT = "{expression}"
MAX_TOKENS = 100_000
_MAX_GRID_SIDE = 1 << 12
_MAX_IMAGE_SIDE = 1 << 14
_MAX_CANVASES = 1_000
_MAX_TILES = 256


@dataclass(frozen=True, kw_only=True)
class Strict:
    """The base of all parts of a manifest, and of the sizes in a recipe."""

    # pydantic reads this where a recipe nests one of these classes; it needs no import here.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class GridSpec(Strict):
    """The visual tokens of one image or tile before pruning, in raster order: N = rows * cols."""

    rows: int
    cols: int

    @property
    def num_visual_tokens(self) -> int:
        """N, visual tokens of one image before pruning."""
        return self.rows * self.cols


@dataclass(frozen=True, kw_only=True)
class TilesSpec(Strict):
    """Canvases an image may be fitted to and cut into tiles.

    Attributes:
        resolutions: (height, width) in pixels, each a multiple of the tile's. With ``anyres`` the
            first of equals is taken, which decides for every image that all of them would enlarge.
            With ``dynamic_tiles`` smaller canvases stand before larger ones, see
            ``runtime.images.geometry.nearest_canvas``.
        follows: With ``anyres`` alone: whose code is followed in which rows and columns of tokens
            are padding, ``transformers`` or the model's ``authors``; see ``spec.tiles.TileLayout``.
    """

    resolutions: tuple[tuple[int, int], ...]
    follows: TileCode = field(default="transformers", metadata=ADDED_LATER)


@dataclass(frozen=True, kw_only=True)
class ImageSpec(Strict):
    """How an image becomes ``pixel_values`` [I,3,height,width] float32.

    Attributes:
        height: Pixels the vision encoder reads, vertical; of one tile where there are tiles.
        width: Pixels the vision encoder reads, horizontal.
        preparation: A name of :mod:`gap_export.spec.preparations`. ``pad``: padded to a square,
            centered, with pad_color, then resized; ``squash``: resized without regard to the aspect
            ratio; ``anyres``: squashed as the base tile, and fitted with pad_color to one of
            ``tiles.resolutions``, cut into tiles (LLaVA-1.6); ``dynamic_tiles``: squashed to that
            of ``tiles.resolutions`` whose aspect ratio is nearest, cut into tiles and, where there
            are several, followed by the squashed image as a thumbnail (InternVL).
        pad_color: RGB 0..255 of the padding.
        resample: Filter of the resize.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.
        grids: Rows and columns of visual tokens of each canvas that an image may be squashed to,
            whichever has its aspect; as many tokens each, of one size in pixels. The first is
            ``height`` x ``width``: tokens of another are laid on it one after the other, and the
            vision encoder is told which. Empty where there is one canvas.
        tiles: With ``anyres`` and ``dynamic_tiles`` alone.
    """

    height: int
    width: int
    preparation: str
    pad_color: tuple[int, int, int]
    resample: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    grids: tuple[tuple[int, int], ...] = field(default=(), metadata=RARE)
    tiles: TilesSpec | None = None

    @property
    def has_newlines(self) -> bool:
        """Whether the model's newline vector ends each row of tokens joined from tiles."""
        return self.preparation in WITH_NEWLINE


@dataclass(frozen=True, kw_only=True)
class QuestionSpec(Strict):
    """Where the user's question stands in a prompt template.

    Attributes:
        start: The question begins behind the first of these, e.g. ``USER:``.
        end: It ends before the last of these, e.g. ``ASSISTANT:``.
        image: What stands for the image, its markers included; no part of the question.
    """

    start: str
    end: str
    image: str


@dataclass(frozen=True, kw_only=True)
class PromptSpec(Strict):
    """How an expression becomes token ids.

    Attributes:
        template: Holds ``image_token`` once and ``{expression}`` once.
        image_token: The text that stands for the image.
        tokenization: ``whole``: the tokenizer knows the image token as one id; ``segments``: the
            texts before and after the image are tokenized one by one, the first as the start of a
            sequence, and the tokenizer never sees the image token.
        max_expression_tokens: A longer expression is refused.
        max_new_tokens: Upper bound of the answer's length, in tokens.
        question: Where the question stands; None where that is not known.
    """

    template: str
    image_token: str
    tokenization: Literal["whole", "segments"] = "whole"
    max_expression_tokens: int
    max_new_tokens: int
    question: QuestionSpec | None = field(default=None, metadata=ADDED_LATER)

    def question_template(self) -> str | None:
        """The question as TRIM's and CDPruner's authors feed it to the text tower.

        That is what the user says, without the conversation around it and without the image, which
        leaves a space. It holds ``{expression}`` once.

        Returns:
            None where the template does not say where the question stands.
        """
        marks = self.question
        if marks is None or not (marks.start and marks.end and marks.image):
            return None
        _, start, rest = self.template.partition(marks.start)
        said, end, _ = rest.rpartition(marks.end)
        question = " ".join(said.replace(marks.image, " ").split())
        found = start and end and self.image_token not in question
        return question if found and question.count("{expression}") == 1 else None


@dataclass(frozen=True, kw_only=True)
class BoxSpec(Strict):
    """How the answer's text becomes a box.

    Attributes:
        syntax: ``bracketed``: ``[x1, y1, x2, y2]``; ``angled``: ``{<x1><y1><x2><y2>}``;
            ``corners``: ``(x1,y1),(x2,y2)``.
        scale: Coordinates run from 0 to this. Two numbers, for x and for y, where they are pixels
            of what the vision encoder reads: its width and its height.
        frame: What they are relative to: the ``padded_square`` or the ``image`` as given.
    """

    syntax: Literal["bracketed", "angled", "corners"]
    scale: tuple[float, float] | float
    frame: Literal["padded_square", "image"]

    @property
    def ends(self) -> tuple[float, float]:
        """To what x runs, and y."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale, self.scale)

    def describe_ends(self) -> str:
        """The same in words, behind "from 0"."""
        if not isinstance(self.scale, tuple):
            return f"to {self.scale:g}"
        return f"to {self.scale[0]:g} in x and {self.scale[1]:g} in y"


def wrong_facts(
    grid: GridSpec, image: ImageSpec, prompt: PromptSpec, box: BoxSpec
) -> Iterator[WrongFact]:
    """Each value that makes no sense, by name; none where all do."""
    tokens, sides = range(1, MAX_TOKENS + 1), range(1, _MAX_IMAGE_SIDE + 1)
    for name, value, allowed in (
        ("grid.rows", grid.rows, range(1, _MAX_GRID_SIDE + 1)),
        ("grid.cols", grid.cols, range(1, _MAX_GRID_SIDE + 1)),
        ("image.height", image.height, sides),
        ("image.width", image.width, sides),
        *(("image.pad_color", value, range(256)) for value in image.pad_color),
        ("prompt.max_expression_tokens", prompt.max_expression_tokens, tokens),
        ("prompt.max_new_tokens", prompt.max_new_tokens, tokens),
    ):
        if value not in allowed:
            yield name, value, f"{allowed[0]}..{allowed[-1]}"
    if not all(map(math.isfinite, image.mean)):
        yield "image.mean", image.mean, "finite numbers"
    ends = [("box.scale", end) for end in box.ends]
    for name, number in (*(("image.std", std) for std in image.std), *ends):
        if not (math.isfinite(number) and number > 0):
            yield name, number, "a finite number above 0"
    if isinstance(box.scale, tuple) and box.scale != (image.width, image.height):
        yield "box.scale", box.scale, f"{image.width}, {image.height}: image.width, image.height"
    yield from wrong_template("prompt.template", prompt.template)
    # Only a name that is not ours has the families of other packages looked up.
    if image.preparation not in SHARED and image.preparation not in known_preparations():
        yield "image.preparation", image.preparation, ", ".join(known_preparations())
    if image.preparation in SHARED and (image.tiles is not None) != (image.preparation in TILED):
        cut = " or ".join(sorted(TILED))
        yield "image.tiles", image.tiles, f"there with preparation {cut}, and only there"
    if image.grids and not _are_sisters(image, grid):
        sisters = "canvases of as many visual tokens, grid the first, with preparation squash"
        yield "image.grids", image.grids, sisters
    if image.tiles is not None:
        yield from _wrong_tiles(image, image.tiles.resolutions)


def wrong_template(name: str, template: str) -> Iterator[WrongFact]:
    """What is wrong with a text that an expression is put into."""
    if template.count(SLOT) != 1:
        yield name, template, f"a text that holds {SLOT} exactly once"
    if any("\ud800" <= character <= "\udfff" for character in template):
        yield name, template, "text without half characters (surrogates)"


def _are_sisters(image: ImageSpec, grid: GridSpec) -> bool:
    """Whether all canvases have as many visual tokens, and nothing else tells them apart."""
    numbers = {rows * cols for rows, cols in image.grids if rows > 0 and cols > 0}
    return (
        image.preparation == "squash"
        and image.grids[0] == (grid.rows, grid.cols)
        and 2 <= len(image.grids) == len(set(image.grids)) <= _MAX_CANVASES
        and numbers == {grid.num_visual_tokens}
        and all(side > 0 for one in image.grids for side in one)
        and image.height % grid.rows == 0 == image.width % grid.cols
    )


def _wrong_tiles(image: ImageSpec, resolutions: tuple[tuple[int, int], ...]) -> Iterator[WrongFact]:
    if not 1 <= len(resolutions) <= _MAX_CANVASES:
        yield "number of image.tiles.resolutions", len(resolutions), f"1..{_MAX_CANVASES}"
    areas = [height * width for height, width in resolutions]
    if image.preparation == DYNAMIC_TILES and areas != sorted(areas):
        yield "image.tiles.resolutions", resolutions, "smaller canvases before larger ones"
    for height, width in resolutions:
        whole = height % image.height == 0 and width % image.width == 0
        tiles = (height // image.height) * (width // image.width)
        if not whole or height < 1 or width < 1 or tiles > _MAX_TILES:
            wanted = f"multiples of the tile's {image.height} x {image.width}"
            yield "image.tiles.resolutions", [height, width], f"{wanted}, at most {_MAX_TILES}"
