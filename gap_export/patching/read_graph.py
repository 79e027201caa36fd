"""Reads the ONNX file of another tool, trusting nothing in it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from gap_export.errors import BundleError, PassError, UsageError
from gap_export.graph.passes.matching import all_nodes
from gap_export.spec.manifest import check_member_path

# A protobuf message cannot be larger.
_MAX_BYTES = (1 << 31) - 1
# What the onnx and onnx_ir packages raise on content that is not what it says it is.
_DAMAGED = (
    DecodeError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
    OverflowError, NotImplementedError, RecursionError,
)  # fmt: skip
_WEIGHT_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}
# Operators of graphs whose weights are held in fewer bits.
_QUANTIZED = frozenset({
    "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "GatherBlockQuantized",
    "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QGemm",
    "QLinearMatMul", "QuantizeLinear",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ForeignGraph:
    """A graph that another tool exported.

    Attributes:
        path: The file.
        model: The structure; weights in other files are not read.
        dtype: Dtype of most weights: float32, float16 or bfloat16.
        weight_files: Other files that hold weights, by their path as the graph says it, relative to
            the folder of ``path``.
    """

    path: Path
    model: ir.Model
    dtype: str
    weight_files: dict[str, Path]


def read_graph(path: Path) -> ForeignGraph:
    """Read an ONNX file and check what it refers to.

    Raises:
        UsageError: too large, damaged, quantized, without weights, or with weights in a file that
            is not there, too short, or out of the folder.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= _MAX_BYTES:
            raise UsageError(
                "not an ONNX file of sensible size",
                seen=f"{path}: {size} bytes",
                allowed=f"1..{_MAX_BYTES} bytes; larger models hold weights in a file beside",
            )
        # An error says what there is to say of a graph that does not hold together.
        with quiet(ir.serde.__name__):
            model = ir.load(path)
        fault = _find_fault(model)
        if fault is not None:
            raise _damaged(path, fault)
        quantized = sorted({node.op_type for node in all_nodes(model)} & _QUANTIZED)
        if quantized:
            raise UsageError(
                "quantized graphs are not handled",
                seen=f"{path}: {', '.join(quantized)}",
                allowed="graphs in float32 or float16",
            )
        dtype, weight_files = _main_dtype(path, model), _check_weight_files(path, model)
    except OSError as err:
        raise UsageError("the export cannot be read", seen=f"{path}: {err.strerror}") from err
    except _DAMAGED as err:
        raise _damaged(path, first_line(err)) from err
    return ForeignGraph(path=path, model=model, dtype=dtype, weight_files=weight_files)


def save_patched(graph: ForeignGraph, path: Path) -> None:
    """Write a graph with its weights where they are.

    Raises:
        UsageError: it holds what can be read and cannot be written, e.g. a name that is not text.
    """
    try:
        ir.save(graph.model, path)
    except ir.serde.SerdeError as err:
        raise _damaged(graph.path, first_line(err)) from err


@contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Silence a logger of the onnx packages, which report what is then raised."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def first_line(err: Exception) -> str:
    """What an error of the onnx packages says, without the dump that follows."""
    return (str(err).splitlines() or [type(err).__name__])[0][:200]


def with_shapes(model: ir.Model) -> ir.Model:
    """A copy of a model with all the shapes that ONNX's own inference finds; no weight is read.

    Raises:
        PassError: the graph does not hold together.
    """
    inference = common_passes.ShapeInferencePass(data_prop=True)
    try:
        # What it fails at, it reports, and leaves the shapes open.
        with quiet(type(inference).__module__):
            return inference(model.clone()).model
    except (RuntimeError, ValueError) as err:
        raise PassError(
            "shapes cannot be worked out",
            seen=first_line(err),
            fix="get the export again, or export the model again",
        ) from err


def _damaged(path: Path, seen: str) -> UsageError:
    return UsageError(
        "not an ONNX file, or a damaged one", seen=f"{path}: {seen}", fix="get it again"
    )


def _all_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    graphs: dict[int, ir.Graph] = {id(model.graph): model.graph}
    for node in all_nodes(model):
        if isinstance(node.graph, ir.Graph):
            graphs[id(node.graph)] = node.graph
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield attribute.as_tensor()
    for graph in graphs.values():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _find_fault(model: ir.Model) -> str | None:
    """In what a graph does not hold together, as far as patching it rests on that."""
    if not model.graph.outputs:
        return "a graph without outputs"
    read: list[ir.Value] = list(model.graph.outputs)
    # Names are text; bytes that are none are read without complaint, and cannot be written.
    names: list[object] = [value.name for value in model.graph.inputs]
    for node in all_nodes(model):
        names += [node.name, node.op_type, node.domain, *(value.name for value in node.outputs)]
        read += [value for value in node.inputs if value is not None]
    names += [value.name for value in read]
    strange = next((name for name in names if not isinstance(name, str | None)), None)
    if strange is not None:
        return f"a name that is not text, {str(strange)[:100]}"
    for value in read:
        if value.producer() is None and not (value.is_graph_input() or value.is_initializer()):
            return f"{str(value.name)[:100]} is read, and nothing gives it"
    return _find_disorder(model.graph) or _find_torn_tensor(model)


def _find_disorder(graph: ir.Graph) -> str | None:
    """A node that reads what comes behind it: nodes out of order, or in a circle."""
    passed: set[int] = set()
    for node in graph:
        for value in node.inputs:
            giver = None if value is None else value.producer()
            if giver is not None and giver.graph is graph and id(giver) not in passed:
                return f"node {str(node.name)[:100]} reads what a node behind it gives"
        passed.add(id(node))
    return None


def _find_torn_tensor(model: ir.Model) -> str | None:
    """Weights in the file itself whose bytes are not those of their shape."""
    for tensor in _all_tensors(model):
        sizes = list(tensor.shape.numpy())
        if any(size < 0 for size in sizes):
            return f"{str(tensor.name)[:100]} has shape {sizes}"
        if isinstance(tensor, ir.TensorProtoTensor) and tensor.raw.HasField("raw_data"):
            held = len(tensor.raw.raw_data)
            if held != tensor.nbytes:
                return f"{str(tensor.name)[:100]} of shape {sizes} has {held} bytes"
    return None


def _main_dtype(path: Path, model: ir.Model) -> str:
    elements: Counter[str] = Counter()
    for tensor in _all_tensors(model):
        if tensor.dtype in _WEIGHT_DTYPES:
            elements[_WEIGHT_DTYPES[tensor.dtype]] += tensor.size
    if not elements:
        raise UsageError(
            "the graph has no weights in floating point",
            seen=path,
            allowed=", ".join(_WEIGHT_DTYPES.values()),
        )
    return elements.most_common(1)[0][0]


def _check_weight_files(path: Path, model: ir.Model) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for tensor in _all_tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        try:
            check_member_path(location)
        except BundleError as err:
            raise UsageError(
                f"{path}: weights lie outside of its folder",
                seen=repr(location)[:200],
                allowed="relative paths with forward slashes and no '..'",
                fix="do not use this export; get it again from a source you trust",
            ) from err
        file = found.setdefault(location, path.parent / location)
        if not file.is_file():
            raise UsageError(
                f"{path}: a file of weights is not there",
                seen=file,
                fix="get the export again, with all of its files",
            )
        start, length = tensor.offset or 0, tensor.length
        end = start + (tensor.nbytes if length is None else length)
        if start < 0 or end > file.stat().st_size or end - start != tensor.nbytes:
            raise UsageError(
                f"{path}: a weight lies outside of its file",
                seen=f"{tensor.name}: bytes {start} to {end} of {file}, which has "
                f"{file.stat().st_size}",
                allowed=f"{tensor.nbytes} bytes within it",
                fix="get the export again",
            )
    return found
