"""Values inside a graph of a bundle, computed by ONNX Runtime.

Only what lies above the chosen values is run, so that a look at a decoder's position ids costs
nothing, however large the decoder. Weights stay where they are: ONNX Runtime reads them from the
bundle's folder, and nothing is written there.

Graph optimizations are off: a value that was fused with another does not exist any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from gap_export.errors import GapExportError
from gap_export.graph.onnx_file import OnnxFile
from gap_export.runtime.backends.onnxruntime_backend import INPUT_DTYPES, first_line
from gap_export.runtime.backends.onnxruntime_options import (
    ORT_ERRORS,
    session_options,
    spare_memory,
)
from gap_export.runtime.backends.quiet_onnxruntime import ort

Arrays = Mapping[str, NDArray[Any]]

# Where ONNX Runtime looks for weights of a model that it is given as bytes.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_CPU = ["CPUExecutionProvider"]


def run_taps(graph: OnnxFile, names: Sequence[str], feed: Arrays) -> dict[str, NDArray[Any]]:
    """Compute some values of a graph.

    Args:
        graph: A graph of a bundle.
        names: Inputs, computed values or initializers.
        feed: All of the graph's inputs; those that have no part in the values are not looked at.

    Returns:
        By name, in the dtypes the graph has them in.

    Raises:
        GapExportError: ONNX Runtime cannot run the part of the graph that is needed.
    """
    wanted = [name for name in dict.fromkeys(names) if name not in graph.inputs]
    found = {name: feed[name] for name in names if name in graph.inputs}
    if not wanted:
        return found
    options = session_options(None)
    # Weights are mapped, and cast one at a time.
    spare_memory(options)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(graph.folder))
    try:
        session = ort.InferenceSession(
            graph.extract(wanted), options, providers=_CPU, enable_fallback=False
        )
        given = {
            value.name: feed[value.name].astype(INPUT_DTYPES[value.type], copy=False)
            for value in session.get_inputs()
        }
        values = session.run(wanted, given)
    except ORT_ERRORS as err:
        raise GapExportError(
            f"ONNX Runtime {ort.__version__} cannot compute what is inside a graph",
            seen=f"{wanted[0]}: {first_line(err)}",
        ) from err
    return found | dict(zip(wanted, values, strict=True))
