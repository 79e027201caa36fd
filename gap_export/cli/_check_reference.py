"""What ``gap-export check`` compares a bundle with, by its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export.cli._check_options import NUM_SAMPLES, refuse_ignored
from gap_export.errors import UsageError

if TYPE_CHECKING:
    from gap_export.bundle import Bundle
    from gap_export.parity.question import Question
    from gap_export.parity.truth import Truth


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What to compare with and what to ask, as given; see the options of the command."""

    against: Sequence[str]
    checkpoint: Sequence[str]
    samples: int | None
    seed: int | None
    images: Sequence[Path]

    @property
    def seed_used(self) -> int:
        """Of the samples."""
        return self.seed or 0

    def goldens(self) -> dict[str, Path]:
        """Folders of goldens that are named, by what they are."""
        from gap_export.parity.golden import is_golden

        return {f"the golden {each}": Path(each) for each in self.against if is_golden(each)}

    def questions(self) -> list[Question]:
        """Held-out samples; each picture of the user's is asked about with one of their texts.

        Where that is in a picture of the user's nobody knows.
        """
        from gap_export.evaluation.refshapes import iter_samples
        from gap_export.parity.question import Question

        number = NUM_SAMPLES if self.samples is None else self.samples
        samples = list(iter_samples(seed=self.seed_used, num_samples=number))
        asked = [Question(image=s.image, expression=s.expression.text, box=s.box) for s in samples]
        extra = zip(self.images, cycle(samples), strict=False)
        return asked + [Question(image=i, expression=s.expression.text) for i, s in extra]


def golden_folder(value: str) -> str:
    """What ``--against`` names; of a golden's file the golden, which is its folder."""
    from gap_export.parity.golden.format import NAMES

    path = Path(value)
    return str(path.parent) if path.name in NAMES and path.is_file() else value


def find_reference(bundle: Bundle, options: ReferenceOptions, *, needed: bool) -> Truth | None:
    """A golden or PyTorch; None where no level needs one and none is named.

    Args:
        bundle: An opened bundle, not one that was patched from an ONNX export.
        options: What was asked for.
        needed: Whether any level compares with a reference.

    Raises:
        UsageError: it is not there, is that of another model, or two are named.
    """
    from gap_export.checkpoint.find.source import parse_parts, resolve_source
    from gap_export.parity.golden import is_golden, open_golden
    from gap_export.parity.truth import GoldenTruth, TorchTruth

    if options.against and options.checkpoint:
        raise UsageError(
            "--against and --checkpoint both say what to compare with",
            seen=", ".join([*options.against, *options.checkpoint]),
            fix="leave out one of the two",
        )
    if any(is_golden(value) for value in options.against):
        (folder,) = _only_one(options.against, "a golden")
        refuse_ignored(
            "a golden says what was asked",
            {"--samples": options.samples, "--seed": options.seed, "--image": options.images},
        )
        return GoldenTruth(open_golden(folder, bundle.manifest))
    parts = parse_parts([*options.against, *options.checkpoint])
    if not (needed or parts):
        return None
    recipe, source = resolve_source(bundle.manifest, parts)
    return TorchTruth(recipe, source, options.questions(), seed=options.seed_used)


def find_original(options: ReferenceOptions) -> Path:
    """The folder of the export that a bundle was patched from.

    Raises:
        UsageError: it was not named, or something else was.
    """
    refuse_ignored(
        "the bundle was patched from an ONNX export", {"--checkpoint": options.checkpoint}
    )
    if not options.against:
        raise UsageError(
            "the bundle was patched from an ONNX export, and PyTorch does not know that model",
            allowed="that export, or levels that need no reference",
            fix="name its folder: --against DIR; or look at the position ids: --level positions",
        )
    (folder,) = _only_one(options.against, "an export")
    return Path(folder)


def _only_one(values: Sequence[str], what: str) -> Sequence[str]:
    if len(values) > 1:
        raise UsageError(f"{what} is the only one to compare with", seen=", ".join(values))
    return values
