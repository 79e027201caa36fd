"""Options of ``gap-export eval``, and what their values mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from gap_export.errors import OutputError, UsageError
from gap_export.spec.requests import PruningRequest, options_of

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|BUNDLE",
        help="A model is exported at every --pruner and --keep; a bundle is taken as it is.",
    ),
]
_PRUNING = {each.name: each.option for each in options_of(PruningRequest)}
KeepsOption = Annotated[
    list[float] | None,
    typer.Option("--keep", metavar="SHARE", help=f"{_PRUNING['keep_ratio'].help} Repeatable."),
]
PrunersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pruner", metavar="NAME", help=f"{_PRUNING['pruner'].help} Repeatable, or with commas."
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="What to measure on: refshapes[:heldout|train], or refshapes-2, which is harder, "
        "drawn here; refcoco:ROOT:SPLIT, refcoco+ or refcocog, in the folder ROOT; or "
        "FOLDER[:SPLIT].",
    ),
]
EvaluateSamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="N",
        min=0,
        help="How many expressions to ask, the first of each split; 0: all. [default: 500 of "
        "what is drawn, else all]",
    ),
]
AbsentOption = Annotated[
    float,
    typer.Option(
        "--absent",
        metavar="SHARE",
        help="Of what is drawn: so large a share of all that is asked is not there, on top of "
        "--samples. Reports how well the score tells.",
    ),
]
ProtocolOption = Annotated[
    str,
    typer.Option(
        "--protocol",
        metavar="NAME",
        help="When an answer is right: native (that of the model's authors; tolerant where they "
        "publish none), tolerant, unpad, lmms, shikra, minigpt-v2 or vlm-evaluation.",
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEMPLATE",
        help="Ask with this in place of the model's own prompt; it holds the model's image token "
        "and {expression} once each.",
    ),
]
MisalignedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--misaligned",
        metavar="permuted|shifted",
        help="Measure the unpruned model with wrong positions as well. permuted: visual tokens "
        "enter in a random order; shifted: ids from the first visual token on are half a row "
        "higher. Repeatable, or with commas.",
    ),
]
RecordsOption = Annotated[
    Path | None,
    typer.Option(
        "--records",
        metavar="DIR",
        help="Keep the answers, one file a setting; what is there already is not asked again.",
    ),
]
WorkersOption = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar="N|auto|ray://HOST:PORT",
        help="Who answers: 1: this process; a number, or auto for one a CPU: processes of this "
        "machine; an address: a Ray cluster. All but 1 need the extra `ray`.",
    ),
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        metavar="BUNDLE",
        help="Of a BUNDLE: its model exported with --keep 1. [default: made from its weights]",
    ),
]
PicturesOption = Annotated[
    Path | None,
    typer.Option(
        "--pictures",
        metavar="DIR",
        help="Draw the first answer of each row: box, kept tokens, heat map of the scores.",
    ),
]
MinRecoveredOption = Annotated[
    float | None,
    typer.Option(
        "--min-recovered",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="Exit 3 where GAP recovers less than this share (0..1) of the unpruned accuracy.",
    ),
]


def split_names(option: str, names: Sequence[str]) -> list[str]:
    """``["a,b", "c"]`` as ``["a", "b", "c"]``, each once.

    Args:
        option: Which names they are given to.
        names: As given.

    Raises:
        UsageError: it was given, and names nothing: the default would be taken in its place.
    """
    parts = [part.strip() for name in names for part in name.split(",")]
    found = list(dict.fromkeys(part for part in parts if part))
    if names and not found:
        raise UsageError(
            f"{option} names nothing",
            seen=repr(",".join(names)),
            fix="name one, or leave the option out",
        )
    return found


def check_beside_folders(
    reports: Mapping[str, Path | None], *, records: Path | None, pictures: Path | None
) -> None:
    """Refuse reports that would be written over files of records, drawings or their folders.

    Args:
        reports: By option; None was not given.
        records: Where records are kept.
        pictures: Where drawings go.

    Raises:
        OutputError: one would.
    """
    from gap_export.evaluation.records import SUFFIX

    folders = (("--records", records, SUFFIX), ("--pictures", pictures, ".png"))
    for option, report in reports.items():
        for other, folder, suffix in folders:
            if report is None or folder is None:
                continue
            real, within = report.resolve(), report.resolve().parent == folder.resolve()
            if real != folder.resolve() and not (within and report.suffix == suffix):
                continue
            raise OutputError(
                f"{option} would be written over a file of {other}",
                seen=report,
                fix="name another file",
            )
