"""``calibration.json``: at which score an answer of a bundle counts as found.

It lies in the bundle's folder and not in the manifest, since it is measured after the bundle was
made. It names the manifest by its hash, and so every graph and weight; the manifest does not know
of it, and a bundle is whole with and without it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass

from gap_export.bundle.files import CALIBRATION_NAME, CALIBRATION_PART, sha256_of
from gap_export.bundle.opening import Bundle
from gap_export.errors import BundleError, OutputError
from gap_export.spec.manifest import MANIFEST_NAME, from_plain
from gap_export.spec.positions import PositionRule
from gap_export.spec.requests import GrammarName

FORMAT, FORMAT_VERSION = "gap-export-calibration", 1
_MAX_BYTES = 1 << 20
_FIX = "gap-export calibrate BUNDLE measures it anew; without the file there is no verdict"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold of ``Grounding.score``, and what it was measured on.

    Attributes:
        bundle_sha256: Of the bundle's ``gap.json``.
        threshold: An answer of this score or more is found.
        target_recall: Asked share of the objects that are there to be found.
        recall: Share that is found, in 0..1, of the data it was measured on.
        false_box_rate: Share of the objects that are not there and are found all the same.
        auroc: Area under the ROC curve; 0.5 tells nothing.
        auroc_ci95: 95 % interval of it.
        expected_calibration_error: Of the score read as the probability that the object is there.
        roc: Threshold, false-box rate and recall, from the highest threshold down.
        num_present: Expressions whose object is there.
        num_absent: Expressions whose object is not.
        data: The data set, as the user named it.
        data_sha256: Of its ids, expressions and boxes.
        seed: Of its scenes, and of the intervals.
        backend: What ran the bundle.
        positions: How tokens got their position ids.
        grammar: How answers were constrained; None: they were free.
        gap_export_version: Which measured it.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    bundle_sha256: str
    threshold: float
    target_recall: float
    recall: float
    false_box_rate: float
    auroc: float
    auroc_ci95: tuple[float, float]
    expected_calibration_error: float
    roc: tuple[tuple[float, float, float], ...]
    num_present: int
    num_absent: int
    data: str
    data_sha256: str
    seed: int
    backend: str
    positions: PositionRule
    grammar: GrammarName | None
    gap_export_version: str


def manifest_sha256(bundle: Bundle) -> str:
    """SHA-256, hex, of a bundle's manifest."""
    return sha256_of(bundle.path / MANIFEST_NAME)


def read_calibration(bundle: Bundle) -> Calibration | None:
    """The calibration of a bundle; None where it has none.

    Raises:
        BundleError: the file is damaged, or another bundle's.
    """
    path = bundle.path / CALIBRATION_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise BundleError("the calibration cannot be read", seen=f"{path}: {err}") from err
    try:
        plain = json.loads(raw) if len(raw) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise BundleError("the calibration is damaged, or something else", seen=path, fix=_FIX)
    if plain.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            "the calibration is of another version of gap-export",
            seen=plain.get("format_version"),
            allowed=str(FORMAT_VERSION),
            fix=_FIX,
        )
    found = from_plain(Calibration, plain, where=CALIBRATION_NAME)
    if not 0 <= found.threshold <= 1:
        raise BundleError(
            "the threshold is no probability", seen=found.threshold, allowed="0 to 1", fix=_FIX
        )
    if found.bundle_sha256 != (own := manifest_sha256(bundle)):
        raise BundleError(
            "the calibration is of another bundle, whose scores are others",
            seen=f"{path} of a {MANIFEST_NAME} with SHA-256 {found.bundle_sha256[:16]}...",
            allowed=f"{own[:16]}...",
            fix=f"remove the file, or: {_FIX}",
        )
    return found


def write_calibration(bundle: Bundle, calibration: Calibration) -> None:
    """Put a calibration into a bundle's folder; one that is there is replaced in one step.

    Raises:
        OutputError: the folder cannot be written.
    """
    part = bundle.path / CALIBRATION_PART
    try:
        part.write_text(json.dumps(asdict(calibration), indent=1) + "\n", encoding="ascii")
        part.replace(bundle.path / CALIBRATION_NAME)
    except OSError as err:
        with suppress(OSError):
            part.unlink()
        raise OutputError(
            "the calibration cannot be written",
            seen=f"{bundle.path}: {err.strerror or err}",
            fix="make the bundle's folder writable, or calibrate a copy",
        ) from err
