"""The structure of an ONNX file: nodes, types and small constants, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import inliner, numpy_helper, shape_inference

from gap_export.errors import BundleError


def read_structure(path: Path) -> onnx.ModelProto:
    """Read a model without the files its weights lie in.

    Functions are inlined, as TensorRT does; types are inferred as far as ONNX can; tensors that lie
    in other files are left without bytes and without any trace of where they are.

    Raises:
        BundleError: not an ONNX file, or one that does not hold together.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as err:
        raise BundleError("not an ONNX file", seen=f"{path}: {err}") from err
    if not model.HasField("graph"):
        raise BundleError("not an ONNX file", seen=f"{path}: holds no graph")
    try:
        model = inliner.inline_local_functions(model)
        for graph in all_graphs(model.graph):
            for tensor in graph.initializer:
                _forget_place(tensor)
        return shape_inference.infer_shapes(model)
    except (RuntimeError, ValueError, RecursionError) as err:
        raise BundleError(
            "an ONNX file that does not hold together", seen=f"{path}: {err}"
        ) from err


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for found in [*inner, *attribute.graphs]:
                yield from all_graphs(found)


def tensor_types(model: onnx.ModelProto) -> dict[str, str]:
    """The dtype of each tensor by name, e.g. ``float16``, as far as it is known."""
    types: dict[str, str] = {}
    for graph in all_graphs(model.graph):
        for value in (*graph.value_info, *graph.input, *graph.output):
            types[value.name] = _dtype(value.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            types[tensor.name] = _dtype(tensor.data_type)
    return {name: dtype for name, dtype in types.items() if dtype != "undefined"}


def constant_names(model: onnx.ModelProto) -> frozenset[str]:
    """Tensors that are known when an engine is built: constants and what is made of them alone."""
    known: set[str] = set()
    for graph in all_graphs(model.graph):
        known.update(tensor.name for tensor in graph.initializer)
        for node in graph.node:
            if all(name in known for name in node.input if name):
                known.update(node.output)
    return frozenset(known)


def scalar_constants(model: onnx.ModelProto) -> dict[str, int]:
    """Integers of one element by name, where their value stands in the file."""
    values: dict[str, int] = {}
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            _note_value(values, tensor.name, tensor)
        for node in graph.node:
            if node.op_type != "Constant":
                continue
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    _note_value(values, node.output[0], attribute.t)
                elif attribute.name == "value_int" or len(attribute.ints) == 1:
                    values[node.output[0]] = (*attribute.ints, attribute.i)[0]
    return values


def _forget_place(tensor: onnx.TensorProto) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _note_value(values: dict[str, int], name: str, tensor: onnx.TensorProto) -> None:
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    has_bytes = tensor.raw_data or tensor.int64_data or tensor.int32_data
    if tensor.data_type in integers and has_bytes and all(dim == 1 for dim in tensor.dims):
        values[name] = int(numpy_helper.to_array(tensor).reshape(()))


def _dtype(code: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(code).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
