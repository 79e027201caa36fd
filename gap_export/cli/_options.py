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

Backend: TypeAlias = Literal["ort", "trt", "openvino"]

# What a session calls them.
BACKENDS: Mapping[Backend, BackendName] = MappingProxyType(
    {"ort": "onnxruntime", "trt": "tensorrt", "openvino": "openvino"}
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
    bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.", callback=_set_quiet)
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
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")]

RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", help="Recipe that a checkpoint folder follows."),
]
CheckpointOption = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint",
        metavar="[ROLE=]PATH",
        help="Where weights are: a folder, or a file where the part is one. ROLE is main if left "
        "out, else base, tower, ...: see `gap-export models`. Repeatable. [default: where a "
        "bundle's were, and the Hugging Face cache]",
    ),
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        "--backend",
        help="ort: ONNX Runtime; trt: the bundle's TensorRT engines, on this machine's GPU; "
        "openvino: OpenVINO.",
    ),
]
CpuThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="CPU threads. [default: all]"),
]
EnginesOption = Annotated[
    str | None,
    typer.Option(
        "--engines",
        metavar="NAME",
        help="With trt: a folder below the bundle's engines/. [default: the first that fits]",
    ),
]
FormOption = Annotated[
    Literal["base", "ort"] | None,
    typer.Option(
        "--form",
        help="With ort: of the graphs. base: the portable ones; ort: those of ONNX Runtime's own "
        "operators, faster on a CPU. [default: the fastest that runs; of a check: each]",
    ),
]
GrammarOption = Annotated[
    Literal["box"] | None,
    typer.Option(
        "--grammar",
        help="Constrain answers. box: none ends before it holds a box, and a box that is begun is "
        "finished in the model's syntax. [default: answers are the model's own]",
    ),
]
CopyWeightsOption = Annotated[
    bool,
    typer.Option(
        "--copy-weights", help="Copy weights that could be linked, for tools that refuse links."
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The bundle. [default: ./<model>-<pruner>-<keep>]"),
]
ForceBundleOption = Annotated[
    bool, typer.Option("--force", help="Replace a bundle that is there; nothing else.")
]
