"""The command line, one file a command.

Nothing heavy is imported before a command runs: ``gap-export -h`` answers at once, with no extra
installed. stdout is the result, stderr is progress and messages.
"""

from __future__ import annotations

from gap_export.cli._main import main

__all__ = ["main"]
