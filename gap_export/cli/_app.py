"""The command tree: its commands, and which of them runs when none is named."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from gap_export.cli._options import QuietOption, VerboseOption
from gap_export.cli.bench import bench
from gap_export.cli.build import build
from gap_export.cli.calibrate import calibrate
from gap_export.cli.check import check
from gap_export.cli.doctor import doctor
from gap_export.cli.evaluate import evaluate
from gap_export.cli.export import export
from gap_export.cli.ground import ground
from gap_export.cli.inspect_bundle import inspect_bundle
from gap_export.cli.models import models
from gap_export.cli.patch import patch
from gap_export.cli.plan import plan
from gap_export.cli.pruners import pruners
from gap_export.cli.ros_bag import ros_bag
from gap_export.cli.serve import serve
from gap_export.engines.targets import AUTO
from gap_export.errors import UnknownModelError
from gap_export.version import __version__
from gap_export.visible import visible

DEFAULT_COMMAND = "export"
CONTEXT = {"help_option_names": ["-h", "--help"]}
_ANYWHERE = {"-q", "--quiet", "-v", "--verbose"}
# Base of all that is said about wrong usage, which typer does not name in public.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
# What may be meant as a command; a path or a hub id of this form has other characters in it.
_WORD = re.compile(r"\w[\w+-]*", re.ASCII)
_GROUP_ONLY = {"-h", "--help", "--version"}


class DefaultCommandGroup(TyperGroup):
    """Runs ``export`` where the first word is no command: ``gap-export MODEL --keep 0.3``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command where none is named."""
        with plain_messages():
            args = fill_bare(args)
            place = next((n for n, arg in enumerate(args) if arg not in _ANYWHERE), None)
            if place is not None and args[place] not in {*self.commands, *_GROUP_ONLY}:
                self._refuse_near_miss(args[place])
                args = [*args[:place], DEFAULT_COMMAND, *args[place:]]
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, whose own arguments are read here."""
        with plain_messages():
            return super().invoke(ctx)

    def _refuse_near_miss(self, word: str) -> None:
        """A mistyped or unknown command must not become a puzzling message about a model."""
        if not _WORD.fullmatch(word) or Path(word).exists():
            return
        commands = difflib.get_close_matches(word, self.commands, n=1, cutoff=0.75)
        if commands:
            raise typer.BadParameter(f"no command '{word}'. Did you mean '{commands[0]}'?")
        from gap_export.spec.recipe import find_recipe

        try:
            find_recipe(word)
        except UnknownModelError as err:
            # What is like a model's name is left to the message about models.
            if difflib.get_close_matches(word, (err.allowed or "").split(", "), cutoff=0.6):
                return
            raise UnknownModelError(
                "there is no command and no model of that name",
                seen=word,
                allowed=f"a command: {', '.join(self.commands)}; or a model: {err.allowed}",
            ) from None


@contextmanager
def plain_messages() -> Iterator[None]:
    """What is said about wrong usage, cleaned of the user's and the prefix of typer's own.

    A shell puts names of files into arguments, which may hold anything.
    """
    try:
        yield
    except _USAGE_ERROR as err:
        for name in ("message", "option_name", "param_hint"):
            text = getattr(err, name, None)
            if isinstance(text, str):
                setattr(err, name, visible(text.removeprefix("Value error, ")))
        raise


def fill_bare(args: list[str]) -> list[str]:
    """Give ``--trt`` a value where it stands alone, which the parser has no notion of."""
    end = args.index("--") if "--" in args else len(args)
    return [
        f"{arg}={AUTO}"
        if arg == "--trt" and n < end and (n + 1 >= end or args[n + 1].startswith("-"))
        else arg
        for n, arg in enumerate(args)
    ]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"gap-export {__version__}")
        raise typer.Exit


def _root(
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Grounding vision-language models, pruned and exported with their position ids.

    MODEL alone means `export MODEL`: gap-export refshapes-llava --keep 0.3

    Exit codes: 0 fine, 1 failed, 2 wrong usage or input, 3 parity or accuracy below the bar.
    """
    del quiet, verbose, version  # their callbacks did the work


@lru_cache(maxsize=1)
def build_command() -> Any:
    """The command tree, as typer runs it; making it takes longer than refusing an option."""
    app = typer.Typer(
        cls=DefaultCommandGroup,
        add_completion=False,
        # Plain help is quick, the same at any width, and can be searched.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings=CONTEXT,
    )
    app.callback()(_root)
    app.command("export")(export)
    app.command("patch")(patch)
    app.command("build")(build)
    app.command("check")(check)
    app.command("ground")(ground)
    app.command("ros-bag")(ros_bag)
    app.command("serve")(serve)
    app.command("eval")(evaluate)
    app.command("calibrate")(calibrate)
    app.command("bench")(bench)
    app.command("plan")(plan)
    app.command("inspect")(inspect_bundle)
    app.command("models")(models)
    app.command("pruners")(pruners)
    app.command("doctor")(doctor)
    return get_command(app)
