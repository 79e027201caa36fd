"""The local functions of an ONNX file as models of their own, for a runtime that does not inline.

Read and written with the standard library alone, see ``wire``. Domain and name of a function are
what nodes call it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gap_export.errors import BundleError
from gap_export.graph.wire import Message, write_field, write_integer

# Field numbers of onnx.proto.
_MODEL_IR_VERSION, _MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTION = 1, 7, 8, 25
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_ATTRIBUTE = 1, 4, 5, (6, 11)
_FUNCTION_NODE, _FUNCTION_OPSET, _FUNCTION_DOMAIN = 7, 9, 10
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 11, 12
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_TYPE_DTYPE = 1, 2, 1, 1


@dataclass(frozen=True, kw_only=True)
class LocalFunction:
    """A local function.

    Attributes:
        domain: Of the nodes that call it.
        name: Their operator.
        num_inputs: Values that it takes.
        ir_version: Of the model that it is from.
        message: It, as it stands in the file.
    """

    domain: str
    name: str
    num_inputs: int
    ir_version: int
    message: Message

    def model(self, dtypes: Sequence[int]) -> bytes:
        """A model that computes what the function does.

        Args:
            dtypes: Codes of ``TensorProto.DataType`` of the values that it takes.
        """
        graph = bytearray(write_field(_GRAPH_NAME, self.name.encode()))
        for node in self.message.contents(_FUNCTION_NODE):
            graph += write_field(_GRAPH_NODE, bytes(node))
        for name, dtype in zip(self.message.texts(_FUNCTION_INPUT), dtypes, strict=True):
            tensor = write_field(_TYPE_TENSOR, write_integer(_TENSOR_TYPE_DTYPE, dtype))
            value = write_field(_VALUE_NAME, name.encode()) + write_field(_VALUE_TYPE, tensor)
            graph += write_field(_GRAPH_INPUT, value)
        for name in self.message.texts(_FUNCTION_OUTPUT):
            graph += write_field(_GRAPH_OUTPUT, write_field(_VALUE_NAME, name.encode()))
        opsets = (bytes(part) for part in self.message.contents(_FUNCTION_OPSET))
        return b"".join(
            [
                write_integer(_MODEL_IR_VERSION, self.ir_version),
                *(write_field(_MODEL_OPSET, opset) for opset in opsets),
                write_field(_MODEL_GRAPH, bytes(graph)),
            ]
        )


def local_functions(path: Path) -> tuple[LocalFunction, ...]:
    """The local functions of an ONNX file.

    Raises:
        BundleError: it is not an ONNX file, or a function has attributes, which are not handled.
    """
    try:
        model = Message(memoryview(path.read_bytes()))
        found = []
        for message in map(Message, model.contents(_MODEL_FUNCTION)):
            function = LocalFunction(
                domain=message.text(_FUNCTION_DOMAIN),
                name=message.text(_FUNCTION_NAME),
                num_inputs=len(message.texts(_FUNCTION_INPUT)),
                ir_version=(model.integers(_MODEL_IR_VERSION) or [0])[-1],
                message=message,
            )
            if message.contents(*_FUNCTION_ATTRIBUTE):
                raise BundleError(
                    "a local function with attributes is not handled",
                    seen=f"{function.domain}.{function.name} in {path.name}",
                    fix="run the bundle in ONNX Runtime",
                )
            found.append(function)
    except (OSError, ValueError, IndexError) as err:
        raise BundleError("not an ONNX file, or cut short", seen=f"{path}: {err}") from err
    return tuple(found)
