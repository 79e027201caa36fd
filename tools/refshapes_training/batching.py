"""Training batches, rendered in a background process so that drawing and training overlap.

Shape letters: B images, N=144 patches, Q questions in the batch, T packed text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from gap_export.evaluation.refshapes import (
    COLORS,
    GRID_SIZE,
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
from refshapes_training import vocabulary as vocab

NUM_PATCHES = GRID_SIZE * GRID_SIZE
NO_COLOR = len(COLORS)
NO_SHAPE = len(SHAPES)
QUESTIONS_PER_IMAGE = 8
_PADDING_SEGMENT = -1
_ABSENT_PHRASE_PROBABILITY = 0.25

BatchT = TypeVar("BatchT", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What both stages need to know about images.

    Attributes:
        images: uint8 [B, 96, 96, 3].
        color: int64 [B, N], index into COLORS, `NO_COLOR` on the ground.
        shape: int64 [B, N], index into SHAPES, `NO_SHAPE` on the ground.
        small: int64 [B, N], index into SIZES.
        boxes: float32 [B, N, 4], box of the patch's object as fractions of the image.
        covered: bool [B, N], whether a patch shows an object.
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
        phrase_patches: bool [B, 2, N], patches of every object that the phrase mentions.
    """

    captions: Tensor
    phrases: Tensor
    phrase_patches: Tensor


@dataclass(frozen=True, kw_only=True)
class LanguageBatch(Batch):
    """Stage 2: the questions of an image follow one another after one visual prefix.

    Attributes:
        ids: int64 [B, T], expressions, `ASSISTANT:` and the answers but for `</s>`.
        offsets: int64 [B, T], place of a token within its own question.
        segments: int64 [B, T], number of the question, -1 for padding.
        rows: int64 [Q], image of each question.
        asking: int64 [Q], column of its `ASSISTANT:`; the answer follows.
        answers: int64 [Q, 5], four coordinate ids and `</s>`.
        target_patches: bool [Q, N], patches of the object meant.
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


def collate_vision(scenes: list[Scene]) -> VisionBatch:
    """Captions and phrases for stage 1; the words are drawn from the first scene's number."""
    rng = np.random.default_rng([3, scenes[0].seed, scenes[0].index])
    captions, phrases, patches = [], [], []
    for scene in scenes:
        captions.append(vocab.encode_for_text_tower(_caption(rng, scene)))
        phrase, mentioned = _description(rng, scene)
        expression = scene.expressions[int(rng.integers(0, len(scene.expressions)))]
        texts = (phrase, expression.text)
        phrases.append(np.stack([vocab.encode_for_text_tower(text) for text in texts]))
        flat = scene.object_map.reshape(-1)
        patches.append([np.isin(flat, mentioned), np.isin(flat, expression.mentioned)])
    return VisionBatch(
        **_image_fields(scenes),
        captions=torch.from_numpy(np.stack(captions)),
        phrases=torch.from_numpy(np.stack(phrases)),
        phrase_patches=torch.from_numpy(np.asarray(patches)),
    )


def collate_language(scenes: list[Scene]) -> LanguageBatch:
    """Pack the questions of each scene one after another."""
    ids, offsets, segments = [], [], []
    rows, asking, answers, targets = [], [], [], []
    for row, scene in enumerate(scenes):
        row_ids: list[int] = []
        row_offsets: list[int] = []
        row_segments: list[int] = []
        flat = scene.object_map.reshape(-1)
        for number, expression in enumerate(scene.expressions):
            question = [*vocab.encode_words(expression.text), vocab.ASSISTANT]
            answer = vocab.encode_box(scene.objects[expression.target].box)
            rows.append(row)
            asking.append(len(row_ids) + len(question) - 1)
            answers.append([*answer, vocab.EOS])
            targets.append(flat == expression.target)
            row_ids += question + answer
            row_offsets += range(len(question) + len(answer))
            row_segments += [number] * (len(question) + len(answer))
        ids.append(row_ids)
        offsets.append(row_offsets)
        segments.append(row_segments)
    return LanguageBatch(
        **_image_fields(scenes),
        ids=_padded(ids, vocab.PAD),
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


def _image_fields(scenes: list[Scene]) -> dict[str, Tensor]:
    """The fields of `Batch`."""
    maps = np.stack([scene.object_map.reshape(-1) for scene in scenes])
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
        "images": torch.from_numpy(np.stack([scene.image for scene in scenes])),
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
