"""From a PyTorch component to an onnx_ir model whose weights are references."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import nn

from gap_export.checkpoint.weights import PlacedTensor
from gap_export.errors import ExportError
from gap_export.exporting.stamping import is_stampable, shorten, stamp_layers
from gap_export.families.common.reference import Component
from gap_export.spec.manifest import TensorSpec

OPSET = 20
IR_VERSION = 10

_INTERFACE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "int64": torch.int64,
    }
)
# By safetensors' names.
_WEIGHT_DTYPES: Mapping[str, ir.DataType] = MappingProxyType(
    {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
)
# Where _Flat has the component's module.
_ROOT = "module"
_EXPORTER_LOGGER = "torch.onnx._internal.exporter._registration"

logger = logging.getLogger(__name__)


def trace_component(
    component: Component, *, placed: Mapping[str, PlacedTensor], opset: int = OPSET
) -> ir.Model:
    """Trace a component into a model that holds no weight.

    Of a stack the component declares as repeated, three layers are traced and the others stamped
    out, where that can be shown to come to the same.

    Args:
        component: From a reference built on ``meta``.
        placed: For each key of the component's ``weight_refs``, where the graph finds the bytes.
        opset: ONNX opset of the standard operators.

    Returns:
        A model with the component's input and output names and symbolic shapes; each weight is
        external data at its offset in a safetensors file.

    Raises:
        ExportError: torch cannot trace it, a dimension declared dynamic got fixed or does not stand
            for one length, or an initializer is neither a weight, nor a declared constant, nor a
            number of the trace.
    """
    assert all(p.is_meta for p in component.module.parameters()), "trace a meta reference"
    model = _trace_three_layers(component, opset) or _trace(component, opset)
    model.ir_version = IR_VERSION
    model.graph.name = component.name
    _name_interface(model.graph, component)
    _name_dimensions(model.graph, component)
    _refer_weights(model.graph, component, placed)
    return model


def save_graph(model: ir.Model, path: Path) -> None:
    """Write an ONNX file; weights stay where they are, and none is read."""
    ir.save(model, path)


def describe_interface(
    model: ir.Model,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph as the manifest lists them."""
    graph = model.graph
    return tuple(map(_tensor_spec, graph.inputs)), tuple(map(_tensor_spec, graph.outputs))


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name and value.dtype is not None and value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in _dims(value.shape))
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


def _trace_three_layers(component: Component, opset: int) -> ir.Model | None:
    """The whole model by way of a short one; None where that cannot be shown to be the same."""
    if not is_stampable(component):
        return None
    try:
        short = shorten(component)
        model = _trace(short, opset)
        _name_interface(model.graph, short)
        stamp_layers(model.graph, component, root=_ROOT)
    except ExportError as err:
        # What is really wrong with a component shows when all of it is traced.
        logger.debug("%s is traced layer by layer: %s", component.name, err)
        return None
    return model


def _trace(component: Component, opset: int) -> ir.Model:
    examples, dynamic = [], []
    for spec in component.inputs:
        shape = [component.example_sizes[d] if isinstance(d, str) else d for d in spec.shape]
        examples.append(torch.zeros(shape, dtype=_INTERFACE_DTYPES[spec.dtype], device="meta"))
        # AUTO: torch works out by itself that e.g. total = past + sequence.
        named = [i for i, dim in enumerate(spec.shape) if isinstance(dim, str)]
        dynamic.append(dict.fromkeys(named, torch.export.Dim.AUTO))
    with _quiet_exporter():
        try:
            program = torch.export.export(
                _Flat(component.module),
                tuple(examples),
                dynamic_shapes=(tuple(dynamic),),
                strict=False,
            )
            traced = torch.onnx.export(
                program, dynamo=True, optimize=False, opset_version=opset, verbose=False
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as err:
            logger.debug("%s: %s", component.name, err)
            raise ExportError(
                f"torch cannot export {component.name}",
                # Torch explains itself at length.
                seen=(str(err).splitlines() or [type(err).__name__])[0],
                fix="run with -v for all that torch says",
            ) from err
    assert traced is not None
    model: ir.Model = traced.model
    return model


class _Flat(nn.Module):
    """Takes any component's inputs as one row, since torch.export needs named parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: torch.Tensor) -> object:
        return self.module(*tensors)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch's exporter says about itself; nothing there is the user's to mend."""
    logger = logging.getLogger(_EXPORTER_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_interface(graph: ir.Graph, component: Component) -> None:
    for values, specs in (
        (list(graph.inputs), component.inputs),
        (list(graph.outputs), component.outputs),
    ):
        if len(values) != len(specs):
            raise ExportError(
                f"{component.name} traced to another number of inputs or outputs",
                seen=len(values),
                allowed=str(len(specs)),
            )
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name


def _name_dimensions(graph: ir.Graph, component: Component) -> None:
    """Give dimensions their declared names, in the interface and inside."""
    names: dict[str, str] = {}
    for value, spec in zip(
        (*graph.inputs, *graph.outputs), (*component.inputs, *component.outputs), strict=True
    ):
        assert value.shape is not None
        traced = _dims(value.shape)
        fits = len(traced) == len(spec.shape) and all(
            names.setdefault(str(seen), wanted) == wanted
            if isinstance(wanted, str) and isinstance(seen, str)
            else seen == wanted
            for seen, wanted in zip(traced, spec.shape, strict=False)
        )
        if not fits:
            raise ExportError(
                f"{component.name}: {spec.name} traced to another shape",
                seen=traced,
                allowed=str(list(spec.shape)),
            )
    for value in chain(graph.inputs, *(node.outputs for node in graph)):
        if value.shape is not None:
            dims = _dims(value.shape)
            value.shape = ir.Shape([names.get(d, d) if isinstance(d, str) else d for d in dims])


def _dims(shape: ir.Shape) -> list[int | str | None]:
    return [dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in shape]


def _refer_weights(
    graph: ir.Graph, component: Component, placed: Mapping[str, PlacedTensor]
) -> None:
    for name, value in list(graph.initializers.items()):
        key, raw = name.removeprefix(f"{_ROOT}."), getattr(value.const_value, "raw", None)
        if key in component.weight_refs:
            value.const_value = _external(value, placed[key])
        elif key in component.constants:
            value.const_value = ir.tensor(component.constants[key], name=name)
        elif value.const_value is None or (isinstance(raw, torch.Tensor) and raw.is_meta):
            raise ExportError(
                f"{component.name} has an initializer without a value",
                seen=key,
                allowed="weights, declared constants and numbers of the trace",
            )
        if key != name:
            value.name = key


def _external(value: ir.Value, tensor: PlacedTensor) -> ir.ExternalTensor:
    dtype, shape = _WEIGHT_DTYPES[tensor.dtype], ir.Shape(tensor.shape)
    # A reader of the file would take the bytes for what the graph says.
    assert (value.dtype, value.shape) == (dtype, shape), f"{value.name} was cast or cut"
    assert value.name is not None
    return ir.ExternalTensor(
        location=tensor.location,
        offset=tensor.offset,
        length=tensor.length,
        dtype=dtype,
        shape=shape,
        name=value.name,
    )
