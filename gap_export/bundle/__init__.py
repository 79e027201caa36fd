"""A bundle on disk: written all at once or not at all, and checked when opened.

A bundle is a folder whose ``gap.json`` lists every file with its size and SHA-256. Writing happens
in a hidden sibling folder that is renamed at the end; opening refuses anything that is not exactly
what the manifest says. Only ``engines/`` may grow afterwards, whose folders hash themselves, and
``calibration.json`` may be put beside the manifest, which names it by its hash.
"""

from __future__ import annotations

from gap_export.bundle.opening import Bundle, open_bundle
from gap_export.bundle.stamps import Verify
from gap_export.bundle.writing import BundleDraft, write_bundle

__all__ = ["Bundle", "BundleDraft", "Verify", "open_bundle", "write_bundle"]
