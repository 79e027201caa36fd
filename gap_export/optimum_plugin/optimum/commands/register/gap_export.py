"""Registers ``optimum-cli export gap``, which is ``gap-export export``.

optimum-cli imports every file of this folder whenever it starts, so nothing of gap-export is
imported before the command runs. ``optimum`` and the folders below it are namespace packages, which
several distributions fill (PEP 420): none of them may hold an ``__init__.py``.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class GapExportCommand(BaseOptimumCLICommand):
    """Hands the rest of the command line to gap-export, whose flags, help and errors these are."""

    COMMAND = CommandInfo(
        name="gap",
        help="Export a grounding vision-language model, pruned, with its position ids kept.",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take every word as it is."""
        # Without this, -h and what begins with a dash would be optimum's to understand.
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Export, and end the program with gap-export's exit code; optimum-cli has none."""
        from gap_export.cli.optimum_command import run_export

        sys.exit(run_export(self.args.arguments))


# To be read once. Where two installs of gap-export are on the path, optimum-cli reads this list for
# each of them, and argparse refuses a second command of the same name.
REGISTER_COMMANDS = iter([(GapExportCommand, ExportCommand)])
