"""``python -m gap_export``: the command line."""

from __future__ import annotations

import sys

from gap_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
