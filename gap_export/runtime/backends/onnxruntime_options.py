"""How ONNX Runtime is to run a graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from gap_export.errors import UsageError
from gap_export.runtime.backends.quiet_onnxruntime import ort, ort_errors
from gap_export.spec.manifest import Activations

# All that ONNX Runtime raises: classes with no common base, RuntimeError from bound runs, and
# UnicodeDecodeError where a name in a graph, also one that it complains of, is not UTF-8.
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    UnicodeDecodeError,
    *(
        value
        for value in vars(ort_errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
)

# Its errors reach the user as ours; it need not write them to stderr as well.
_FATAL_ONLY = 4
# What goes into products with INT4 weights, as ONNX Runtime counts.
_ACCURACY_LEVELS: Mapping[str, str] = MappingProxyType({"float": "1", "int8": "4"})
# ONNX Runtime starts as many as are asked for; a slip of the key must not take the machine down.
_MAX_THREADS = 256


def session_options(
    num_threads: int | None, *, activations: Activations = "float"
) -> ort.SessionOptions:
    """Options of any graph.

    Args:
        num_threads: Threads of one operator; None to leave it to ONNX Runtime.
        activations: What goes into layers of INT4 weights.

    Raises:
        UsageError: a number of threads out of range.
    """
    # For a program that had imported ONNX Runtime itself before, see quiet_onnxruntime.
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    # By ONNX Runtime's own default what goes into a layer of INT4 weights is rounded to 8 bits,
    # block by block. Here a bundle says whether.
    level = _ACCURACY_LEVELS[activations]
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if num_threads is not None:
        if not 1 <= num_threads <= _MAX_THREADS:
            raise UsageError(
                "number of threads out of range", seen=num_threads, allowed=f"1..{_MAX_THREADS}"
            )
        options.intra_op_num_threads = num_threads
    return options


def start_session(
    graph: Path | bytes, options: ort.SessionOptions, providers: Sequence[str]
) -> ort.InferenceSession:
    """A session of a graph.

    Args:
        graph: Its file, or what would be in it.
        options: From :func:`session_options`.
        providers: ONNX Runtime's names, best first.

    Raises:
        UsageError: a file whose name ONNX Runtime cannot be given.
        RuntimeError: or another of what ONNX Runtime raises where it refuses the graph.
    """
    try:
        name = graph if isinstance(graph, bytes) else os.fsencode(graph).decode("utf-8")
    except UnicodeDecodeError as err:
        raise UsageError(
            "ONNX Runtime opens no file whose name is not UTF-8",
            seen=graph,
            fix="give the folder another name, or move what is in it",
        ) from err
    # Its own fallback prints to standard output, where our JSON goes.
    return ort.InferenceSession(name, options, providers=list(providers), enable_fallback=False)


def spare_memory(options: ort.SessionOptions) -> None:
    """Keep float16 weights in their file, mapped, for graphs that run on the CPU.

    By default ONNX Runtime turns every float16 weight into a float32 one when it loads, and at
    times holds both: 1.5 GiB of weights peaked at 3.2 GB, at 4.7 GB where they are transposed.
    Below the highest level of optimization they stay float16 and are cast when used; in the default
    order, though, all casts come first and all their results are held: 8.0 GB. Ordered by need, one
    weight is float32 at a time: 1.7 GB, most of it pages of the file that can be dropped, or, of
    transposed weights, their float16 transposes. The price is a decode step that takes 2 to 4 times
    as long, and a prefill of 200 tokens a fifth longer.
    """
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
