"""Training batches, rendered in a background process so that drawing and training overlap.

Shape letters: B images, N cells of a grid (patches in stage 1, visual tokens in stage 2), Q
questions in the batch, T packed text tokens, A tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from gap_export.evaluation.refshapes import (
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    generate_scene,
)
from gap_export.evaluation.refshapes.expressions import (
    describe,
    matching,
    random_attribute_use,
)
from gap_export.evaluation.refshapes.objects import SceneObject
from gap_export.evaluation.refshapes.render import shape_mask
from refshapes_training.cells import Cells
from refshapes_training.designs import Design
from refshapes_training.vocabulary import PAD, text_vocabulary, vocabulary_of

NO_COLOR = len(COLORS)
NO_SHAPE = len(SHAPES)
QUESTIONS_PER_IMAGE = 8
_PADDING_SEGMENT = -1
_ABSENT_PHRASE_PROBABILITY = 0.25
# A cell belongs to an object that covers more than this share of it, as in RefShapes' own maps.
_MIN_COVERAGE = 7 / 64

BatchT = TypeVar("BatchT", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What both stages need to know about images.

    Attributes:
        images: uint8 [B, height, width, 3], or [B, tiles, side, side, 3]; see :func:`views`.
        color: int64 [B, N], index into COLORS, `NO_COLOR` on the ground.
        shape: int64 [B, N], index into SHAPES, `NO_SHAPE` on the ground.
        small: int64 [B, N], index into SIZES.
        boxes: float32 [B, N, 4], box of the cell's object as fractions of the image.
        covered: bool [B, N], whether a cell shows an object.
    """

    images: Tensor
    color: Tensor
    shape: Tensor
    small: Tensor
    boxes: Tensor
    covered: Tensor

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class VisionBatch(Batch):
    """Stage 1.

    Attributes:
        captions: int64 [B, 32], `<s> some of the objects </s>`.
        phrases: int64 [B, 2, 32], a description that may fit nothing, and an expression.
        phrase_patches: bool [B, 2, N], cells of every object that the phrase mentions.
    """

    captions: Tensor
    phrases: Tensor
    phrase_patches: Tensor


@dataclass(frozen=True, kw_only=True)
class LanguageBatch(Batch):
    """Stage 2: the questions of an image follow one another after one visual prefix.

    Attributes:
        ids: int64 [B, T], expressions, what follows them, and the answers but for `</s>`.
        offsets: int64 [B, T], place of a token within its own question.
        segments: int64 [B, T], number of the question, -1 for padding.
        rows: int64 [Q], image of each question.
        asking: int64 [Q], column of the last token before the answer.
        answers: int64 [Q, A], `</s>` last.
        target_patches: bool [Q, N], cells of the object meant.
    """

    ids: Tensor
    offsets: Tensor
    segments: Tensor
    rows: Tensor
    asking: Tensor
    answers: Tensor
    target_patches: Tensor


class _Batches(IterableDataset[BatchT], Generic[BatchT]):
    """Endless batches, each a function of the seed and of its number."""

    def __init__(
        self, collate: Callable[[list[Scene]], BatchT], seed: int, size: int, first: int
    ) -> None:
        super().__init__()
        self._collate, self._seed, self._size, self._next = collate, seed, size, first

    def __iter__(self) -> Iterator[BatchT]:
        while True:
            first = self._next * self._size
            self._next += 1
            scenes = [
                generate_scene(
                    split="train",
                    seed=self._seed,
                    index=index,
                    num_expressions=QUESTIONS_PER_IMAGE,
                )
                for index in range(first, first + self._size)
            ]
            yield self._collate(scenes)


def iter_batches(
    collate: Callable[[list[Scene]], BatchT], *, seed: int, size: int, first: int
) -> Iterator[BatchT]:
    """Batches number `first`, `first` + 1, ... made by one background process.

    Args:
        collate: `collate_vision` or `collate_language`.
        seed: Seed of the train split.
        size: Images per batch.
        first: Number of the first batch, so that a resumed run meets no image twice.

    Returns:
        An endless iterator.
    """
    dataset = _Batches(collate, seed, size, first)
    return iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=6))


def collate_vision(design: Design, scenes: list[Scene]) -> VisionBatch:
    """Captions and phrases for stage 1; the words are drawn from the first scene's number."""
    vocab = text_vocabulary()
    maps = [object_map(scene, design.patches) for scene in scenes]
    rng = np.random.default_rng([3, scenes[0].seed, scenes[0].index])
    captions, phrases, patches = [], [], []
    for scene, flat in zip(scenes, maps, strict=True):
        captions.append(vocab.encode_for_text_tower(_caption(rng, scene)))
        phrase, mentioned = _description(rng, scene)
        expression = scene.expressions[int(rng.integers(0, len(scene.expressions)))]
        texts = (phrase, expression.text)
        phrases.append(np.stack([vocab.encode_for_text_tower(text) for text in texts]))
        patches.append([np.isin(flat, mentioned), np.isin(flat, expression.mentioned)])
    return VisionBatch(
        **_image_fields(design, scenes, maps),
        captions=torch.from_numpy(np.stack(captions)),
        phrases=torch.from_numpy(np.stack(phrases)),
        phrase_patches=torch.from_numpy(np.asarray(patches)),
    )


def collate_language(design: Design, scenes: list[Scene]) -> LanguageBatch:
    """Pack the questions of each scene one after another."""
    vocab = vocabulary_of(design.name)
    maps = [object_map(scene, design.tokens) for scene in scenes]
    ids, offsets, segments = [], [], []
    rows, asking, answers, targets = [], [], [], []
    for row, scene in enumerate(scenes):
        row_ids: list[int] = []
        row_offsets: list[int] = []
        row_segments: list[int] = []
        flat = maps[row]
        for number, expression in enumerate(scene.expressions):
            question = [*vocab.encode_words(expression.text), *vocab.asking]
            whole = vocab.encode_box(scene.objects[expression.target].box)
            answer = whole[:-1]
            rows.append(row)
            asking.append(len(row_ids) + len(question) - 1)
            answers.append(whole)
            targets.append(flat == expression.target)
            row_ids += question + answer
            row_offsets += range(len(question) + len(answer))
            row_segments += [number] * (len(question) + len(answer))
        ids.append(row_ids)
        offsets.append(row_offsets)
        segments.append(row_segments)
    return LanguageBatch(
        **_image_fields(design, scenes, maps),
        ids=_padded(ids, PAD),
        offsets=_padded(offsets, 0),
        segments=_padded(segments, _PADDING_SEGMENT),
        rows=torch.tensor(rows),
        asking=torch.tensor(asking),
        answers=torch.tensor(answers),
        target_patches=torch.from_numpy(np.stack(targets)),
    )


def packed_mask(segments: Tensor, prefix: int) -> Tensor:
    """Causal, and blind to the other questions of the same image.

    Args:
        segments: int64 [B, T].
        prefix: Number of tokens before the questions, which everyone sees.

    Returns:
        bool [B, 1, S, S] with S = prefix + T, True where a query may look.
    """
    batch, length = segments.shape
    shared = torch.full((batch, prefix), -2, dtype=segments.dtype, device=segments.device)
    whose = torch.cat([shared, segments], 1)
    allowed = (whose[:, None, :] == whose[:, :, None]) | (whose[:, None, :] == -2)
    total = prefix + length
    causal = torch.ones(total, total, dtype=torch.bool, device=segments.device).tril()
    return (allowed & causal)[:, None]


def object_map(scene: Scene, cells: Cells) -> NDArray[np.int64]:
    """Index of the object that covers most of each cell, or -1; int64 [N].

    The rule of :attr:`Scene.object_map`, for any grids.
    """
    found = [np.full(rows * cols, -1, np.int64) for rows, cols in cells.grids]
    most = [np.full(rows * cols, _MIN_COVERAGE, np.float32) for rows, cols in cells.grids]
    for index, item in enumerate(scene.objects):
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        alpha = shape_mask(item.shape, item.extent)
        canvas[item.y : item.y + item.extent, item.x : item.x + item.extent] = alpha
        whole = Image.fromarray(canvas)
        for number, (rows, cols) in enumerate(cells.grids):
            # The mean over each cell, also where its edges cut pixels.
            covered = np.asarray(whole.resize((cols, rows), Image.Resampling.BOX)).reshape(-1)
            wins = covered > most[number]
            found[number][wins] = index
            most[number][wins] = covered[wins]
    return np.concatenate(found)[cells.order]


def views(design: Design, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What the tower sees of an image, prepared as the package's runtime does.

    Returns:
        uint8 [height, width, 3], or [tiles, side, side, 3], the thumbnail last.
    """
    height, width = design.canvas
    if image.shape[:2] == design.canvas and design.tile is None:
        return image
    whole = Image.fromarray(image)
    squashed = whole.resize((width, height), Image.Resampling.BICUBIC)
    if design.tile is None:
        return np.asarray(squashed)
    side = design.tile
    tiles = [
        squashed.crop((left, top, left + side, top + side))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    tiles.append(whole.resize((side, side), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile) for tile in tiles])


def _image_fields(
    design: Design, scenes: list[Scene], cells: list[NDArray[np.int64]]
) -> dict[str, Tensor]:
    """The fields of `Batch`."""
    maps = np.stack(cells)
    color = np.full(maps.shape, NO_COLOR, np.int64)
    shape = np.full(maps.shape, NO_SHAPE, np.int64)
    small = np.zeros(maps.shape, np.int64)
    boxes = np.zeros((*maps.shape, 4), np.float32)
    for row, scene in enumerate(scenes):
        shown = maps[row] >= 0
        which = maps[row, shown]
        color[row, shown] = np.array([COLORS.index(o.color) for o in scene.objects])[which]
        shape[row, shown] = np.array([SHAPES.index(o.shape) for o in scene.objects])[which]
        small[row, shown] = np.array([SIZES.index(o.size) for o in scene.objects])[which]
        boxes[row, shown] = np.array([o.box for o in scene.objects], np.float32)[which]
    return {
        "images": torch.from_numpy(np.stack([views(design, scene.image) for scene in scenes])),
        "color": torch.from_numpy(color),
        "shape": torch.from_numpy(shape),
        "small": torch.from_numpy(small),
        "boxes": torch.from_numpy(boxes / IMAGE_SIZE),
        "covered": torch.from_numpy(maps >= 0),
    }


def _caption(rng: np.random.Generator, scene: Scene) -> str:
    """Some of the objects, in any order."""
    count = int(rng.integers(1, min(len(scene.objects), 7) + 1))
    chosen = rng.permutation(len(scene.objects))[:count]
    sized = rng.random(count) < 0.5
    return " ".join(
        "the " + describe(scene.objects[int(i)], (bool(s), True, True))
        for i, s in zip(chosen, sized, strict=True)
    )


def _description(rng: np.random.Generator, scene: Scene) -> tuple[str, list[int]]:
    """A description and the objects that it fits, none of them every fourth time or so."""
    use = random_attribute_use(rng)
    like = scene.objects[int(rng.integers(0, len(scene.objects)))]
    if rng.random() < _ABSENT_PHRASE_PROBABILITY:
        like = SceneObject(
            shape=SHAPES[int(rng.integers(0, len(SHAPES)))],
            color=COLORS[int(rng.integers(0, len(COLORS)))],
            size=like.size,
            extent=like.extent,
            x=0,
            y=0,
        )
    return f"the {describe(like, use)}", matching(scene.objects, like, use)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    """Pad on the right to a common length, a multiple of 16; int64 [B, T]."""
    length = -(-max(len(row) for row in rows) // 16) * 16
    table = np.full((len(rows), length), value, np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)
