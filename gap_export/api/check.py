"""Does a bundle compute what its reference computes? ``check``, and ``record`` for goldens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gap_export.api.make import Parts, parts_of
from gap_export.bundle import Bundle
from gap_export.checkpoint.find.bundle_source import resolve_source
from gap_export.checkpoint.find.source import parse_parts
from gap_export.engines.folder import open_whole
from gap_export.errors import UsageError
from gap_export.parity import check as parity
from gap_export.parity.golden import is_golden, open_golden
from gap_export.parity.golden.format import NAMES
from gap_export.parity.patched.check import check_patched, was_patched
from gap_export.parity.question import Question
from gap_export.parity.record import record_truth
from gap_export.parity.results import LEVELS, BackendKey, CheckReport
from gap_export.parity.truth import GoldenTruth, TorchTruth, Truth
from gap_export.progress import Progress, SilentProgress
from gap_export.spec.manifest import FormName
from gap_export.spec.requests import DEFAULT_OPENVINO, BackendOptions, OpenVinoOptions, options_of

NUM_SAMPLES = 50
BACKENDS: tuple[BackendKey, ...] = ("ort", "trt", "openvino")
_Choice = TypeVar("_Choice", bound=str)


def check(
    bundle: str | Path | Bundle,
    *,
    against: str | Path | Sequence[str | Path] = (),
    checkpoint: Parts | None = None,
    backends: Sequence[str] = ("ort",),
    engines: str | None = None,
    form: FormName | None = None,
    openvino: OpenVinoOptions = DEFAULT_OPENVINO,
    levels: Sequence[str] = LEVELS,
    samples: int | None = None,
    seed: int | None = None,
    images: Sequence[str | Path | NDArray[np.uint8]] = (),
    fail_under: Mapping[str, float] | None = None,
    per_layer: bool = False,
    required: Sequence[str] = (),
    progress: Progress | None = None,
) -> CheckReport:
    """Compare a bundle with PyTorch, or with a golden of it.

    Args:
        bundle: Its folder, every byte of which is hashed first; or a bundle that is open.
        against: What to compare with: a checkpoint (``[ROLE=]PATH``, the same as ``checkpoint``), a
            golden, or of a patched bundle the export that was patched. Empty: the checkpoint, where
            the bundle's was.
        checkpoint: The checkpoint's folder, or its parts by role.
        backends: What runs the bundle: ``ort`` for ONNX Runtime, ``trt`` for its engines,
            ``openvino`` for OpenVINO.
        engines: With ``trt``: a folder below the bundle's ``engines/``; None for the first that
            fits.
        form: With ``ort``: ``base`` or ``ort`` of the graphs; None for each that the bundle has.
        openvino: With ``openvino``: how it runs.
        levels: What to compare: ``positions``, ``tensor``, ``token``, ``box``, ``task``.
        samples: How many expressions to ask; None for 50, or a golden's own.
        seed: Seed of the samples; None for 0.
        images: More images to compare on.
        fail_under: For ``token``, ``box`` and ``task``: the share in 0..1 below which a level
            fails.
        per_layer: Compare the outputs of the model's layers as well.
        required: Backends that must have been run.
        progress: Progress reporter.

    Returns:
        The verdict; ``passed`` sums it up.

    Raises:
        BundleError: the bundle or its engines are damaged.
        UsageError: there is nothing to compare with, or an option would be ignored.

    Example:
        >>> import gap_export
        >>> gap_export.check("demo", levels=["positions"]).passed
        True
    """
    opened = bundle if isinstance(bundle, Bundle) else open_whole(Path(bundle))
    reference = _Reference(
        against=against_of(against),
        checkpoint=parts_of(checkpoint),
        samples=samples,
        seed=seed,
        images=images,
    )
    run = choose(backends, BACKENDS, "--backend")
    compared = choose(levels, LEVELS, "--level")
    must = choose(required, BACKENDS, "--require")
    bars = {
        choose([name], LEVELS, "--fail-under")[0]: share
        for name, share in (fail_under or {}).items()
    }
    needed = parity.needs_reference(compared)
    if "trt" not in {*run, *must}:
        refuse_ignored("it is for --backend trt", {"--engines": engines})
    if "ort" not in {*run, *must}:
        refuse_ignored("it is for --backend ort", {"--form": form})
    if "openvino" not in {*run, *must}:
        refuse_ignored("it is for --backend openvino", openvino_flags(openvino))
    if not needed:
        refuse_ignored(
            "no level that is asked for asks the model anything", reference.questions_given
        )
    if was_patched(opened.manifest) and needed:
        refuse_ignored(
            "unpatched graphs give tensors, to be compared with those of the bundle",
            {"--fail-under": bars, "--per-layer": per_layer},
        )
        return check_patched(
            opened,
            reference.original(),
            reference.questions(),
            backends=run,
            levels=compared,
            required=must,
            seed=seed or 0,
            progress=progress,
        )
    return parity.check_bundle(
        opened,
        reference=reference.find(opened, needed=needed),
        backends=run,
        levels=compared,
        options=BackendOptions(engines=engines, form=form, openvino=openvino),
        fail_under=bars,
        per_layer=per_layer,
        required=must,
        progress=progress,
    )


def record(
    bundle: str | Path | Bundle,
    folder: str | Path,
    *,
    against: str | Path | Sequence[str | Path] = (),
    checkpoint: Parts | None = None,
    backends: Sequence[str] = ("ort",),
    samples: int | None = None,
    seed: int | None = None,
    images: Sequence[str | Path | NDArray[np.uint8]] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write what PyTorch gives as a golden, which :func:`check` takes where there is no PyTorch.

    Args:
        bundle: Its folder, or a bundle that is open.
        folder: The golden's.
        against: The checkpoint, ``[ROLE=]PATH``; empty for where the bundle's was.
        checkpoint: The same, by role.
        backends: The one that will be compared with the golden, which decides its dtype.
        samples: How many expressions to ask; None for 50.
        seed: Seed of the samples; None for 0.
        images: More images to ask about.
        force: Replace a golden that is there.
        progress: Progress reporter.

    Returns:
        The golden's folder.

    Raises:
        UsageError: several backends, or no checkpoint to record from.
        OutputError: the folder is taken, inside the bundle, or cannot be written.

    Example:
        >>> import gap_export
        >>> golden = gap_export.record("demo", "golden", samples=1)
        >>> gap_export.check("demo", against=golden, levels=["token"]).passed
        True
    """
    opened = bundle if isinstance(bundle, Bundle) else open_whole(Path(bundle))
    run = choose(backends, BACKENDS, "--backend")
    if len(run) != 1:
        raise UsageError(
            "a golden is for one backend, whose dtype it has",
            seen=", ".join(run) or "none",
            fix="record one for each",
        )
    if was_patched(opened.manifest):
        raise UsageError("PyTorch does not know the model of a patched bundle: no golden of it")
    reference = _Reference(
        against=against_of(against),
        checkpoint=parts_of(checkpoint),
        samples=samples,
        seed=seed,
        images=images,
    )
    truth = reference.find(opened, needed=True)
    if not isinstance(truth, TorchTruth):
        raise UsageError(
            "a golden is recorded from a checkpoint, and not from another golden",
            seen=", ".join(reference.against),
        )
    return record_truth(
        opened,
        truth,
        Path(folder),
        backend=run[0],
        force=force,
        progress=progress or SilentProgress(),
    )


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """What to compare with, and what to ask."""

    against: Sequence[str]
    checkpoint: Mapping[str, Path]
    samples: int | None
    seed: int | None
    images: Sequence[str | Path | NDArray[np.uint8]]

    @property
    def questions_given(self) -> dict[str, object]:
        """The options about what is asked, by flag."""
        return {"--samples": self.samples, "--seed": self.seed, "--image": len(self.images) or None}

    def questions(self) -> list[Question]:
        """Held-out samples; each image of the user's is asked about with one of their texts.

        Where that is in an image of the user's is not known.
        """
        from gap_export.evaluation.refshapes import iter_samples

        number = NUM_SAMPLES if self.samples is None else self.samples
        samples = list(iter_samples(seed=self.seed or 0, num_samples=number))
        asked = [Question(image=s.image, expression=s.expression.text, box=s.box) for s in samples]
        extra = zip(self.images, cycle(samples), strict=False)
        return asked + [
            Question(image=Path(i) if isinstance(i, str) else i, expression=s.expression.text)
            for i, s in extra
        ]

    def find(self, bundle: Bundle, *, needed: bool) -> Truth | None:
        """A golden or PyTorch; None where no level needs one and none is named.

        Raises:
            UsageError: it is not there, is that of another model, or two are named.
        """
        if self.against and self.checkpoint:
            raise UsageError(
                "--against and --checkpoint both say what to compare with",
                seen=", ".join([*self.against, *map(str, self.checkpoint.values())]),
                fix="leave out one of the two",
            )
        if any(is_golden(value) for value in self.against):
            folder = self._only_one("a golden")
            refuse_ignored("a golden says what was asked", self.questions_given)
            return GoldenTruth(open_golden(folder, bundle.manifest))
        parts = {**parse_parts(self.against), **self.checkpoint}
        if not (needed or parts):
            return None
        recipe, source = resolve_source(bundle.manifest, parts)
        return TorchTruth(recipe, source, self.questions(), seed=self.seed or 0)

    def original(self) -> Path:
        """The folder of the export that a bundle was patched from.

        Raises:
            UsageError: it was not named, or something else was.
        """
        refuse_ignored(
            "the bundle was patched from an ONNX export", {"--checkpoint": self.checkpoint}
        )
        if not self.against:
            raise UsageError(
                "the bundle was patched from an ONNX export, and PyTorch does not know that model",
                allowed="that export, or levels that need no reference",
                fix="name its folder: --against DIR; or look at the position ids: "
                "--level positions",
            )
        return self._only_one("an export")

    def _only_one(self, what: str) -> Path:
        if len(self.against) > 1:
            raise UsageError(
                f"{what} is the only one to compare with", seen=", ".join(self.against)
            )
        return Path(self.against[0])


def against_of(values: str | Path | Sequence[str | Path]) -> list[str]:
    """What is named; a golden's file stands for the golden, which is its folder."""
    paths = [Path(each) for each in ([values] if isinstance(values, (str, Path)) else values)]
    return [str(p.parent if p.name in NAMES and p.is_file() else p) for p in paths]


def choose(values: Sequence[str], allowed: Sequence[_Choice], option: str) -> list[_Choice]:
    """Each of the values once.

    Raises:
        UsageError: one that there is not.
    """
    known = {str(choice): choice for choice in allowed}
    unknown = next((value for value in values if value not in known), None)
    if unknown is not None:
        raise UsageError(f"{option} has no such choice", seen=unknown, allowed=", ".join(known))
    return [known[value] for value in dict.fromkeys(values)]


def openvino_flags(options: OpenVinoOptions) -> dict[str, bool]:
    """The flags of OpenVINO's options, and whether each was given a value of its own."""
    return {
        each.flag: getattr(options, each.name) != each.default
        for each in options_of(OpenVinoOptions)
    }


def refuse_ignored(why: str, options: Mapping[str, object]) -> None:
    """An option that would be ignored is an error.

    Args:
        why: Why it would be.
        options: Values by flag; None, False and what is empty were not given.

    Raises:
        UsageError: one was given.
    """
    # A seed of 0 was.
    given = [
        name
        for name, value in options.items()
        if value or (isinstance(value, int) and not isinstance(value, bool))
    ]
    if given:
        raise UsageError(f"{', '.join(given)} cannot be used here: {why}")
