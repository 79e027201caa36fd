"""Linear layers of 8-bit integers, as OpenVINO computes them fast.

OpenVINO multiplies the matrices of ONNX's MatMulInteger as floats, of weights that it has made
float32. What it is fast with is a layer whose weights are compressed: floats that it is told to
dequantize, ``Multiply(Convert(int8), scales)``. It then keeps them as integers, and rounds what
goes into the layer to 8 bits itself, by token and in groups of channels (its "dynamic
quantization"), which is finer than one scale for the whole tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import openvino as ov


def float_products(openvino: Any) -> tuple[Any, ...]:
    """Extensions of a core that read the operators of such a layer as those of floats.

    DynamicQuantizeLinear gives what it was given, with a scale of 1 and a zero point of 0, and
    MatMulInteger a product of floats.
    """
    from openvino.frontend.onnx import ConversionExtension

    ops = openvino.opset15

    def quantize(node: Any) -> list[Any]:
        numbers = (ops.constant(np.float32(1)), ops.constant(np.uint8(0)))
        return [node.get_input(0), *(number.output(0) for number in numbers)]

    def multiply(node: Any) -> list[Any]:
        weight = ops.convert(node.get_input(1), "f32")
        return [ops.matmul(node.get_input(0), weight, False, False).output(0)]

    return (
        ConversionExtension("DynamicQuantizeLinear", "", quantize),
        ConversionExtension("MatMulInteger", "", multiply),
    )


def join_scales(openvino: Any, model: ov.Model) -> None:
    """``(x @ w) * (1 * scales)`` becomes ``x @ (w * scales)``, of int8 weights [K, N].

    Args:
        openvino: The package.
        model: As :func:`float_products` has it read; it is changed.

    Raises:
        ValueError: a layer is not as QuantizeDynamically writes it.
    """
    ops = openvino.opset15
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        weight = product.input_value(1).get_node()
        if weight.get_type_name() != "Convert":
            continue
        if weight.input_value(0).get_element_type() != openvino.Type.i8:
            continue
        scaled = _reader(product)
        if scaled.get_type_name() == "Convert":
            scaled = _reader(scaled)
        factors = [value for value in _inputs(scaled) if value.get_type_name() == "Multiply"]
        scales = [
            value for each in factors for value in _inputs(each) if len(value.output(0).shape) == 1
        ]
        if scaled.get_type_name() != "Multiply" or len(scales) != 1:
            raise ValueError(f"an int8 layer is in another form: {product.get_friendly_name()}")
        joined = ops.multiply(weight, scales[0])
        made = ops.matmul(product.input_value(0), joined, False, False)
        for reader in scaled.output(0).get_target_inputs():
            reader.replace_source_output(made.output(0))


def _reader(node: Any) -> Any:
    """What alone reads a node.

    Raises:
        ValueError: several do.
    """
    (only,) = node.output(0).get_target_inputs()
    return only.get_node()


def _inputs(node: Any) -> list[Any]:
    return [node.input_value(index).get_node() for index in range(node.get_input_size())]
