"""What a data set asks: expressions about images, each with the box that is the right answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from gap_export.evaluation.drawn import GENERATORS, DrawnName
from gap_export.evaluation.refshapes import Split
from gap_export.parity.metrics import Box
from gap_export.runtime.images.files import EncodedImage
from gap_export.runtime.images.image import ImageFrame, ImageInput

UnusableReason = Literal[
    "missing picture",
    "broken picture",
    "picture of another size",
    "box outside the picture",
    "empty box",
    "empty expression",
    "refused expression",
]
# A correct answer exists to these, so a missing answer is wrong. To all other expressions there is
# none.
_COUNTED_AS_WRONG: frozenset[UnusableReason] = frozenset(
    {"missing picture", "broken picture", "picture of another size", "refused expression"}
)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where an image comes from, and the frame that boxes on it are in.

    Small, so that it can be sent to a worker. Exactly one of the first three is given.

    Attributes:
        path: A file.
        parquet: A file of parquet and a row of it, from 0; its column ``image`` holds the image.
        scene: Split, seed, index and number of expressions of a scene that is drawn.
        generator: Which data set the scene is of.
        frame: ``raw``: boxes are of the image as stored; ``upright``: as displayed, turned as EXIF
            says.
    """

    path: Path | None = None
    parquet: tuple[Path, int] | None = None
    scene: tuple[Split, int, int, int] | None = None
    generator: DrawnName = "refshapes"
    frame: ImageFrame = "upright"

    def __post_init__(self) -> None:
        given = (self.path, self.parquet, self.scene)
        assert sum(each is not None for each in given) == 1, "an image has one source"

    def load(self) -> ImageInput:
        """The image, in a form that ``GroundingSession.ground_batch`` takes.

        A file is not opened here: the session does it.

        Returns:
            A path, the bytes of a file, or uint8 [H, W, 3].

        Raises:
            ImageError: the parquet file cannot be read any more.
            MissingDependencyError: pyarrow is not installed.
        """
        if self.path is not None:
            return self.path
        if self.parquet is not None:
            # Not at the top: nothing else needs pyarrow.
            from gap_export.evaluation.datasets.parquet_images import read_image

            file, row = self.parquet
            return EncodedImage(data=read_image(file, row), name=f"{file}, row {row}")
        assert self.scene is not None, "an image has one source"
        split, seed, index, num_expressions = self.scene
        generate = GENERATORS[self.generator].scene
        return generate(split=split, seed=seed, index=index, num_expressions=num_expressions).image


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One expression about one image, as it is annotated.

    Attributes:
        id: Unique in the data set, the same whenever it is opened.
        image_id: Shared by all expressions about one image.
        expression: What to look for, of any length.
        box: (x1, y1, x2, y2) in pixels of the image, in its frame; finite. None where the object
            is not there.
        image_size: Width and height in pixels as annotated; None where they are not.
        kind: Type of the expression; None in a set without types.
        split: Which part of the data set it is from.
    """

    id: str
    image_id: str
    expression: str
    box: Box | None
    image_size: tuple[int, int] | None
    kind: str | None
    split: str


@dataclass(frozen=True, kw_only=True)
class Question(Asked):
    """An expression that can be asked; its box is the right answer, cut at the image's border.

    Attributes:
        image: Where the image comes from; the same for all questions about one image.
    """

    box: Box
    image: ImageSource


@dataclass(frozen=True, kw_only=True)
class AbsentQuestion(Asked):
    """An expression about an image that does not show the object: there is no right box.

    Attributes:
        image: See :class:`Question`.
    """

    box: None = None
    image: ImageSource


AnyQuestion: TypeAlias = Question | AbsentQuestion


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """An expression of the data set that cannot be asked, and why.

    Attributes:
        question_id: As the question's would be.
        image_id: As the question's would be.
        split: Which part of the data set it is from.
        kind: Type of the expression; None in a set without types.
        reason: What is wrong.
        detail: The value seen: a box, a file that was looked for.
    """

    question_id: str
    image_id: str
    split: str
    kind: str | None
    reason: UnusableReason
    detail: str

    @classmethod
    def of(cls, asked: Asked, reason: UnusableReason, detail: str) -> Unusable:
        """What is wrong with a question, or with an annotation that would be one."""
        return cls(
            question_id=asked.id,
            image_id=asked.image_id,
            split=asked.split,
            kind=asked.kind,
            reason=reason,
            detail=detail,
        )

    @property
    def counts_as_wrong(self) -> bool:
        """Whether it stays in the denominator, as a wrong answer.

        Without the expressions whose image is missing, the accuracy would not be that of the data
        set. An annotation that no answer can match is left out.
        """
        return self.reason in _COUNTED_AS_WRONG


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Questions, and the expressions that could not be made one.

    Attributes:
        spec: How the user named it.
        name: ``refshapes``, ``refshapes-2``, ``refcoco``, or a folder's name.
        splits: Those that were opened.
        layout: How it is stored.
        fingerprint: SHA-256, hex, of what is asked: ids, images, expressions, boxes, splits. The
            images' bytes and where they are have no part in it.
        questions: Those about one image stand together.
        unusable: Those that were asked for and cannot be.
        absent: Expressions of objects that are not there; no part of ``num_expressions``.
    """

    spec: str
    name: str
    splits: tuple[str, ...]
    layout: str
    fingerprint: str
    questions: tuple[Question, ...]
    unusable: tuple[Unusable, ...]
    absent: tuple[AbsentQuestion, ...] = ()

    @property
    def asked(self) -> tuple[AnyQuestion, ...]:
        """All that are asked, those about one image together."""
        by_image: dict[str, list[AnyQuestion]] = {}
        all_asked: list[AnyQuestion] = [*self.questions, *self.absent]
        for one in all_asked:
            by_image.setdefault(one.image_id, []).append(one)
        return tuple(one for group in by_image.values() for one in group)

    @property
    def num_expressions(self) -> int:
        """All that were asked for, usable or not."""
        return len(self.questions) + len(self.unusable)

    @property
    def frame(self) -> str:
        """The frame of its boxes; where it has both of them, both."""
        return ", ".join(sorted({question.image.frame for question in self.questions}))
