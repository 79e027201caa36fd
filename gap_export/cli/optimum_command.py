"""``optimum-cli export gap``: ``gap-export export`` for people who live in optimum.

The file that optimum finds is ``optimum/commands/register/gap_export.py``. What it hands over is
read by a command made from the one definition of ``export``; only MODEL becomes ``--model``, as it
is in optimum's own exporters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from gap_export.cli._app import CONTEXT, fill_bare, plain_messages
from gap_export.cli._main import main
from gap_export.cli._options import MODEL_HELP
from gap_export.cli._requests import with_signature
from gap_export.cli.export import export

PROGRAM = "optimum-cli export gap"

_ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]


def run_export(arguments: Sequence[str]) -> int:
    """Export a model.

    Args:
        arguments: What stands after ``optimum-cli export gap``.

    Returns:
        The exit code, as :func:`gap_export.cli.main` gives it.
    """
    return main(arguments, command=build_optimum_command, program=PROGRAM)


def build_optimum_command() -> Any:
    """``export`` with ``--model``, as typer runs it."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(
        cls=_OptimumExport,
        help="Export a pruned model, as `gap-export export` does.",
        no_args_is_help=True,
        context_settings=CONTEXT,
    )(_with_model_option(export))
    return get_command(app)


class _OptimumExport(TyperCommand):
    """A command that stands alone, and reads its words as one of the group's does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the flags, a bare ``--trt`` among them."""
        if args and not args[0].startswith("-"):
            raise typer.BadParameter(
                f"Missing option '--model' / '-m': here the model has a flag, --model {args[0]}"
            )
        with plain_messages():
            return super().parse_args(ctx, fill_bare(args))


def _with_model_option(function: Callable[..., None]) -> Callable[..., None]:
    """The same function to typer, but for where its ``model`` comes from."""
    signature = inspect.signature(function)
    parameters = [
        p.replace(annotation=_ModelOption) if p.name == "model" else p
        for p in signature.parameters.values()
    ]

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> None:
        function(*args, **values)

    return with_signature(command, parameters)
