"""The exception tree and the exit codes. Every error a user can meet is one of these.

    GapExportError                      1  something failed
    |-- UsageError                      2  wrong usage or input
    |   |-- UnknownModelError              no recipe, alias or folder of that name
    |   |-- RecipeError                    a recipe.yaml that does not hold together
    |   |-- CheckpointError                weights missing, of another architecture, or not matching
    |   |-- UnsupportedPrunerError         the model has not got what the pruner reads
    |   |-- OutputError                    the output folder is taken, or cannot be written
    |   |-- BundleError                    a bundle that is damaged, unsafe or too new
    |   |-- ImageError                     an image that cannot be used
    |   |   |-- ImageFormatError             no image, or of a format that is not read
    |   |   `-- ImageSizeError               beyond the limits of pixels, bytes or time
    |   |-- ExpressionError                a referring expression that cannot be used
    |   `-- MissingDependencyError         an extra is not installed
    |-- ExportError                     1  tracing or a graph pass failed
    |   `-- PassError                      a pass declined or broke its contract
    |-- EngineError                     1  TensorRT did not take a graph, or could not build it
    |-- ComputationError                1  a graph gave NaN, infinity, or one number everywhere
    `-- ParityError                     3  the candidate does not agree with the reference

An error's text says what is wrong, the value seen, what is allowed and what to do.
"""

from __future__ import annotations

from enum import IntEnum

from gap_export.visible import visible


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    OK = 0
    FAILED = 1
    USAGE = 2
    BELOW_BAR = 3


class GapExportError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: What is wrong, one clause, no full stop.
        seen: The value seen, if there is one.
        allowed: What would have been fine.
        fix: What the user can do about it.

    Example:
        >>> import gap_export
        >>> try:
        ...     gap_export.GroundingSession.open("no-such-folder")
        ... except gap_export.GapExportError as err:
        ...     int(err.exit_code)
        2
    """

    exit_code = ExitCode.FAILED

    def __init__(
        self,
        what: str,
        *,
        seen: object | None = None,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.seen = seen
        self.allowed = allowed
        self.fix = fix
        parts = [what if seen is None else f"{what}: {seen}"]
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if fix is not None:
            parts.append(fix)
        # Much of it may come from files and models; an error is one line.
        super().__init__(visible("; ".join(parts)))


class UsageError(GapExportError):
    """Wrong usage or wrong input; the user can mend it."""

    exit_code = ExitCode.USAGE


class UnknownModelError(UsageError):
    """No recipe, alias or checkpoint folder of that name."""


class RecipeError(UsageError):
    """A recipe that does not hold together."""


class CheckpointError(UsageError):
    """Weights that are missing, of another architecture, or do not match the model."""


class UnsupportedPrunerError(UsageError):
    """The model has not got what the pruner reads (a CLS token, a text tower)."""


class OutputError(UsageError):
    """The output folder is taken, or cannot be written."""


class BundleError(UsageError):
    """A bundle that is damaged, unsafe, incomplete or too new."""


class ImageError(UsageError):
    """An image that cannot be used."""


class ImageFormatError(ImageError):
    """Data that is no image, or of a format that is not read."""


class ImageSizeError(ImageError):
    """An image beyond the limits of pixels, bytes or time to decode it."""


class ExpressionError(UsageError):
    """A referring expression that cannot be used."""


class MissingDependencyError(UsageError):
    """A package of an optional extra is not installed."""


class ExportError(GapExportError):
    """Tracing or a graph pass failed."""


class PassError(ExportError):
    """A graph pass declined, or broke the contract of its base class."""


class EngineError(GapExportError):
    """TensorRT did not take a graph, or could not build its engine."""


class ComputationError(GapExportError):
    """A graph gave floats that nothing can be read from: NaN, infinity, one number everywhere."""


class ParityError(GapExportError):
    """The candidate does not agree with the reference, or accuracy is below its bar."""

    exit_code = ExitCode.BELOW_BAR
