"""Reading a bundle's graphs into OpenVINO.

OpenVINO knows no local functions of ONNX: each of them is read as a model of its own, and its
operators are put where it is called. So the bundle's own graphs run, none is changed on the disk,
and the weights are mapped from their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gap_export.errors import BundleError, MissingDependencyError
from gap_export.extras import pip_install, require_extra
from gap_export.graph.function_models import LocalFunction, local_functions
from gap_export.runtime.backends.openvino_int8 import float_products, join_scales

if TYPE_CHECKING:
    import openvino as ov

# What fails is often named last.
_MOST_TOLD = 1000
# All that OpenVINO raises, by way of pybind11.
OPENVINO_ERRORS = (RuntimeError, ValueError, TypeError)
PAST, PRESENT, BEAM_IDX = "past_key_values.", "present.", "beam_idx"
# OpenVINO's names of what functions are fed, as codes of TensorProto.DataType.
_ONNX_DTYPES = {"f32": 1, "i32": 6, "i64": 7, "boolean": 9, "f16": 10, "bf16": 16}


def import_openvino() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it is not installed, or does not load.
    """
    require_extra("openvino", "running a bundle in OpenVINO")
    try:
        import openvino
    except (ImportError, OSError) as err:
        raise MissingDependencyError(
            "the package openvino does not load",
            seen=first_line(err),
            fix=f"install it again: {pip_install('openvino')}",
        ) from err
    return openvino


def read_graph(openvino: Any, path: Path, *, has_int8_layers: bool = False) -> ov.Model:
    """A graph as OpenVINO has it.

    Args:
        openvino: The package.
        path: The graph's file.
        has_int8_layers: Whether it has linear layers as QuantizeDynamically writes them: they are
            read as products with compressed weights, see ``openvino_int8``.

    Raises:
        BundleError: OpenVINO refuses it.
    """
    core = openvino.Core()
    try:
        for function in local_functions(path):
            core.add_extension(_inliner(core, function))
        for extension in float_products(openvino) if has_int8_layers else ():
            core.add_extension(extension)
        model = core.read_model(path)
        if has_int8_layers:
            join_scales(openvino, model)
    except OPENVINO_ERRORS as err:
        raise refused(openvino, path.name, err) from err
    return model


def make_stateful(openvino: Any, decoder: ov.Model, past: Sequence[str]) -> None:
    """Let a decoder keep its cache itself, as states, in place of inputs and outputs.

    Where all layers are float32 attention as an export writes it, that becomes OpenVINO's own
    operator, behind states that it grows in place: the model then reads :data:`BEAM_IDX` as well,
    int32 [B], the rows of the cache that rows go on from. Other states are empty, of no rows, until
    they are set.

    Args:
        openvino: The package.
        decoder: The model, which is changed.
        past: Its inputs ``past_key_values.*``, after which the states are called; each has an
            output ``present.*``.
    """
    from openvino.op import assign, read_value
    from openvino.op.util import Variable, VariableInfo

    ops = openvino.opset15
    is_fused = 2 * _fuse_attention(openvino, decoder) == len(past)
    if is_fused:
        beams = ops.parameter([-1], np.int32, name=BEAM_IDX)
        beams.output(0).set_names({BEAM_IDX})
        num_rows = ops.gather(ops.shape_of(decoder.input("attention_mask")), [0], np.int64(0))
    for name in past:
        taken = decoder.input(name).get_node()
        given = decoder.output(name.replace(PAST, PRESENT, 1)).get_node()
        info = VariableInfo()
        info.variable_id = name
        info.data_shape, info.data_type = taken.get_partial_shape(), taken.get_element_type()
        variable = Variable(info)
        if is_fused:
            heads, width = (info.data_shape[axis].get_length() for axis in (1, 3))
            shape = ops.concat([num_rows, np.array([heads, 0, width])], 0)
            empty = ops.broadcast(ops.constant(0.0, info.data_type), shape)
            held = ops.gather(read_value(empty, variable), beams, np.int64(0))
        else:
            held = read_value(variable)
        for reader in taken.output(0).get_target_inputs():
            reader.replace_source_output(held.output(0))
        decoder.add_sinks([assign(given.input_value(0).get_node(), variable)])
        decoder.remove_result(given)
        decoder.remove_parameter(taken)
    if is_fused:
        decoder.add_parameters([beams])


def _fuse_attention(openvino: Any, decoder: ov.Model) -> int:
    """softmax(q k^T scale + bias) v becomes one operator, where it is float32; how often."""
    ops, number = openvino.opset15, 0
    for softmax in decoder.get_ordered_ops():
        readers = softmax.output(0).get_target_inputs() if softmax.get_output_size() else ()
        if softmax.get_type_name() != "Softmax" or len(readers) != 1:
            continue
        weighted = next(iter(readers)).get_node()
        add = softmax.input_value(0).get_node()
        scaled, bias = (add.input_value(i) for i in (0, 1)) if _is(add, "Add") else (None, None)
        if scaled is None or not _is(scaled.get_node(), "Multiply") or not _is(weighted, "MatMul"):
            continue
        product, scale = (scaled.get_node().input_value(index) for index in (0, 1))
        if not _is(product.get_node(), "MatMul") or not _is(scale.get_node(), "Constant"):
            continue
        query, turned = (product.get_node().input_value(index) for index in (0, 1))
        if not _is(turned.get_node(), "Transpose") or query.get_element_type() != openvino.Type.f32:
            continue
        key, value = turned.get_node().input_value(0), weighted.input_value(1)
        fused = ops.scaled_dot_product_attention(query, key, value, bias, scale, False)
        for reader in weighted.output(0).get_target_inputs():
            reader.replace_source_output(fused.output(0))
        number += 1
    return number


def _is(node: Any, kind: str) -> bool:
    return bool(node.get_type_name() == kind)


def _inliner(core: ov.Core, function: LocalFunction) -> Any:
    from openvino.frontend.onnx import ConversionExtension

    def convert(node: Any) -> list[Any]:
        given = [node.get_input(index) for index in range(function.num_inputs)]
        dtypes = [_ONNX_DTYPES[value.get_element_type().get_type_name()] for value in given]
        # Functions that it calls are known to this core as well.
        body = core.read_model(function.model(dtypes))
        for parameter, value in zip(body.get_parameters(), given, strict=True):
            for reader in parameter.output(0).get_target_inputs():
                reader.replace_source_output(value)
        return [result.input_value(0) for result in body.get_results()]

    return ConversionExtension(function.name, function.domain, convert)


def refused(openvino: Any, file: str, err: Exception) -> BundleError:
    """The error for a graph that OpenVINO does not run."""
    return BundleError(
        f"OpenVINO {version(openvino)} refuses {file}",
        seen=first_line(err),
        fix="run the bundle in ONNX Runtime",
    )


def version(openvino: Any) -> str:
    """Its version without the build."""
    return str(openvino.__version__).split("-", 1)[0]


def first_line(err: Exception) -> str:
    """What OpenVINO says, without where in its source that was raised."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]
    return " ".join(told or lines or [type(err).__name__])[:_MOST_TOLD]
