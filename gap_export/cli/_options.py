"""Options that several commands share, defined once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from gap_export.cli._terminal import Terminal

if TYPE_CHECKING:
    from gap_export.runtime.session import BackendName

Order: TypeAlias = Literal["raster", "score"]
ExtraToken: TypeAlias = Literal["none", "mean", "weighted"]
ExtraPosition: TypeAlias = Literal["last", "centroid"]
Budget: TypeAlias = Literal["fixed", "adaptive"]
PrunerText: TypeAlias = Literal["expression", "question"]
Positions: TypeAlias = Literal["gap", "compact"]
Backend: TypeAlias = Literal["ort", "trt"]

# What a session calls them.
BACKENDS: Mapping[Backend, BackendName] = MappingProxyType(
    {"ort": "onnxruntime", "trt": "tensorrt"}
)


def _set_quiet(ctx: typer.Context, value: bool) -> None:
    if value:
        terminal_of(ctx).quiet = True


def _set_verbose(ctx: typer.Context, value: bool) -> None:
    if value:
        terminal_of(ctx).set_verbose()


def terminal_of(ctx: Any) -> Terminal:
    """The terminal that :func:`gap_export.cli.main` made for this run."""
    terminal = ctx.find_root().obj
    assert isinstance(terminal, Terminal)
    return terminal


QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Nothing on stderr but errors.", callback=_set_quiet),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Log messages, and tracebacks of bugs.", callback=_set_verbose
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

MODEL_HELP = (
    "Name or alias of a recipe (see `gap-export models`), its hub id, or a checkpoint folder."
)
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=MODEL_HELP,
        show_default=False,
    ),
]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.", show_default=False)
]

KEEP_HELP = "Share of the visual tokens to keep, in (0, 1]. [default: the recipe's]"
# Where the budget can be chosen as well.
KEEP_OR_BOUND_HELP = KEEP_HELP.replace("recipe's]", "recipe's; with an adaptive budget 1]")
PRUNER_HELP = "Which tokens survive: see `gap-export pruners`. [default: the recipe's]"

OrderOption = Annotated[
    Order | None,
    typer.Option(
        "--order", help="Order of the kept tokens. [default: the pruner's]", show_default=False
    ),
]
ExtraTokenOption = Annotated[
    ExtraToken | None,
    typer.Option(
        "--extra-token",
        help="One token for all that is dropped: their mean, or their sum weighted by score. "
        "[default: the pruner's]",
        show_default=False,
    ),
]
ExtraPositionOption = Annotated[
    ExtraPosition | None,
    typer.Option(
        "--extra-position",
        help="Position id of the extra token: the last visual token's, or the centre's of all that "
        "is dropped. [default: last]",
        show_default=False,
    ),
]
BudgetOption = Annotated[
    Budget | None,
    typer.Option(
        "--budget",
        help="fixed: --keep of every image; adaptive: exactly as many as stand out in each (by "
        "the pruner's scores), at least 1 and at most --keep. "
        "[default: the pruner's where --keep is not given, else fixed]",
        show_default=False,
    ),
]
PrunerTextOption = Annotated[
    PrunerText | None,
    typer.Option(
        "--pruner-text",
        help="What a pruner that reads the text reads: the expression alone, or the whole question "
        "that the model is asked. [default: as the pruner's authors have it]",
        show_default=False,
    ),
]
PositionsOption = Annotated[
    Positions,
    typer.Option(
        "--positions", help="gap: original position ids; compact: re-numbered, the naive baseline."
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        help="Of the samples, of pruners that draw, and of random weights.",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Recipe that a checkpoint folder follows.",
        show_default=False,
    ),
]
CheckpointOption = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint",
        metavar="[ROLE=]PATH",
        help="Where weights are: a folder, or a file where the part is one. ROLE is main if left "
        "out, else base, tower, ...: see `gap-export models`. Repeatable. [default: where a "
        "bundle's were, and the Hugging Face cache]",
        show_default=False,
    ),
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        "--backend",
        help="ort: ONNX Runtime; trt: the bundle's TensorRT engines, on this machine's GPU.",
    ),
]
EnginesOption = Annotated[
    str | None,
    typer.Option(
        "--engines",
        metavar="NAME",
        help="With trt: a folder below the bundle's engines/. [default: the first that fits]",
        show_default=False,
    ),
]
