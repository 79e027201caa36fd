"""Options about TensorRT engines and quantized weights."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import typer

from gap_export.errors import UsageError
from gap_export.spec.manifest import QuantizationSpec

BARE_TRT = "--trt"
_BLOCK_SIZE = 32

GraphDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
ExportDtype: TypeAlias = Literal["float32", "float16", "bfloat16", "int4"]

ExportDtypeOption = Annotated[
    ExportDtype | None,
    typer.Option(
        "--dtype",
        help="Of weights, graph inputs and outputs; int4: of the decoder's weights alone. "
        "[default: the checkpoint's]",
        show_default=False,
    ),
]
TrtOption = Annotated[
    list[str] | None,
    typer.Option(
        BARE_TRT,
        metavar="[TARGET]",
        help="TensorRT engines for rtx, rtx:sm89, desktop, orin or thor. Repeatable. Alone: build "
        "what can be built here, prepare the rest.",
        show_default=False,
    ),
]
LoweringOption = Annotated[
    Literal["portable", "fused"] | None,
    typer.Option(
        "--lowering",
        help="Of the graphs for TensorRT. portable: primitive operators; fused: Attention, RoPE "
        "and a cache in place. [default: the best a target builds]",
        show_default=False,
    ),
]
MaxPromptOption = Annotated[
    int | None,
    typer.Option(
        "--max-prompt",
        metavar="N",
        help="Longest pruned prompt an engine takes, in tokens. [default: the longest there can "
        "be]",
        show_default=False,
    ),
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        help="Longest answer an engine's cache has room for. [default: the recipe's]",
        show_default=False,
    ),
]
BatchOption = Annotated[
    int,
    typer.Option("--batch", metavar="N", help="Most expressions at a time an engine takes."),
]
WheelOption = Annotated[
    bool,
    typer.Option(
        "--wheel",
        help="With --trt for another machine: put this gap-export itself into the bundle, as a "
        "wheel file (25 MB) that the device installs without asking any package index.",
    ),
]
BlockSizeOption = Annotated[
    int | None,
    typer.Option(
        "--block-size",
        metavar="N",
        help=f"With --dtype int4: weights that share a scale, 32, 64 or 128. "
        f"[default: {_BLOCK_SIZE}]",
        show_default=False,
    ),
]
QuantizerOption = Annotated[
    Literal["rtn", "awq"] | None,
    typer.Option(
        "--quantizer",
        help="With --dtype int4. rtn: round to nearest; awq: scale channels first, by what "
        "pictures show of them. [default: rtn]",
        show_default=False,
    ),
]
LmHeadOption = Annotated[
    bool,
    typer.Option("--quantize-lm-head", help="With --dtype int4: the LM head as well."),
]


def split_dtype(
    dtype: ExportDtype | None,
    *,
    block_size: int | None = None,
    quantizer: Literal["rtn", "awq"] | None = None,
    lm_head: bool = False,
) -> tuple[GraphDtype | None, QuantizationSpec | None]:
    """The graphs' dtype, and how weights are quantized.

    Raises:
        UsageError: an option about quantization without ``--dtype int4``.
    """
    if dtype == "int4":
        return None, QuantizationSpec(
            dtype="int4",
            block_size=_BLOCK_SIZE if block_size is None else block_size,
            method=quantizer or "rtn",
            lm_head=lm_head,
        )
    given = {
        "--block-size": block_size is not None,
        "--quantizer": quantizer is not None,
        "--quantize-lm-head": lm_head,
    }
    for flag, is_given in given.items():
        if is_given:
            raise UsageError(
                f"{flag} is about quantized weights",
                seen=f"--dtype {dtype}" if dtype else "no --dtype",
                fix=f"add --dtype int4, or leave out {flag}",
            )
    return dtype, None
