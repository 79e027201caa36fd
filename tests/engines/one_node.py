"""ONNX models of one node each, to ask a TensorRT parser what it takes of an operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

# The dtype under test, in place of a name.
T = "T"
_VECTOR, _MATRIX, _IMAGE = (6,), (4, 6), (1, 8, 6, 6)


@dataclass(frozen=True, kw_only=True)
class OneNode:
    """How to use an operator once.

    Attributes:
        inputs: (dtype, shape) of those fed at run time.
        constants: Values of further inputs, after them; None where one is left out. A tuple is
            (dtype, values), with dtype T for the one under test.
        outputs: dtype of each.
        attributes: Of the node.
        opset: That defines it so.
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    constants: tuple[Any, ...] = ()
    outputs: tuple[str, ...] = (T,)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 20


def make_model(operator: str, dtype: str) -> onnx.ModelProto:
    """The model for an operator of NODES whose data is of a dtype."""
    node = NODES[operator]

    inputs = [
        helper.make_tensor_value_info(f"x{i}", _code(name, dtype), shape)
        for i, (name, shape) in enumerate(node.inputs)
    ]
    names, initializers = [value.name for value in inputs], []
    for i, constant in enumerate(node.constants):
        if constant is None:
            names.append("")
            continue
        name, values = constant
        array = np.asarray(values)
        initializers.append(
            helper.make_tensor(f"c{i}", _code(name, dtype), array.shape, array.flatten().tolist())
        )
        names.append(f"c{i}")
    outputs = [
        helper.make_tensor_value_info(f"y{i}", _code(name, dtype), None)
        for i, name in enumerate(node.outputs)
    ]
    attributes = dict(node.attributes)
    if "value" in attributes:
        attributes["value"] = helper.make_tensor("value", _code(T, dtype), [1], [1])
    if operator == "If":
        # The branches read x1 and x2 from outside.
        attributes = {key: _branch(name, dtype) for key, name in attributes.items()}
        names = names[:1]
    if operator == "Scan":
        attributes["body"] = _step(dtype)
    made = helper.make_node(
        operator, names, [value.name for value in outputs], name="n", **attributes
    )
    graph = helper.make_graph([made], "one", inputs, outputs, initializers)
    return helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid("", node.opset)]
    )


def _step(dtype: str) -> onnx.GraphProto:
    """A loop's body that puts out what it carried, and carries on what it reads."""
    value = {
        name: helper.make_tensor_value_info(name, _code(T, dtype), _VECTOR)
        for name in ("carried", "read", "carried_on", "put_out")
    }
    nodes = [
        helper.make_node("Identity", ["read"], ["carried_on"]),
        helper.make_node("Identity", ["carried"], ["put_out"]),
    ]
    return helper.make_graph(
        nodes,
        "step",
        [value["carried"], value["read"]],
        [value["carried_on"], value["put_out"]],
    )


def _branch(name: str, dtype: str) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(f"y_{name}", _code(T, dtype), None)
    node = helper.make_node("Identity", [name], [value.name])
    return helper.make_graph([node], name, [], [value])


def _code(name: str, dtype: str) -> int:
    wanted = dtype if name == T else name
    return getattr(
        TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(wanted, wanted.upper())
    )


def _each(names: str, **spec: Any) -> dict[str, OneNode]:
    return {name: OneNode(**spec) for name in names.split()}


def _ints(*values: int) -> tuple[str, np.ndarray]:
    return "int64", np.array(values)


def _int(value: int) -> tuple[str, np.ndarray]:
    return "int64", np.array(value)


_ONE = ((T, _MATRIX),)
_TWO = ((T, _MATRIX), (T, _MATRIX))
_PICTURE = ((T, _IMAGE),)
_HEADS = tuple((T, (1, 2, 4, 64)) for _ in range(3))
_KERNEL = (T, np.ones((4, 8, 3, 3)))
_CHANNELS = (T, np.ones(8))

NODES: Mapping[str, OneNode] = MappingProxyType(
    {
        **_each(
            "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor "
            "Gelu HardSigmoid HardSwish Hardmax Identity LeakyRelu Log LogSoftmax LpNormalization "
            "Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus "
            "Softsign Sqrt Tan Tanh ThresholdedRelu Trilu RandomNormalLike RandomUniformLike "
            "Bernoulli Flatten Transpose EyeLike",
            inputs=_ONE,
        ),
        **_each("IsInf IsNaN", inputs=_ONE, outputs=("bool",)),
        **_each("Shape Size ArgMax ArgMin NonZero", inputs=_ONE, outputs=("int64",)),
        **_each(
            "Add And BitwiseAnd BitwiseOr BitwiseXor Div Max Mean Min Mod Mul Or Pow Sub Sum Xor",
            inputs=_TWO,
        ),
        **_each("Equal Greater GreaterOrEqual Less LessOrEqual", inputs=_TWO, outputs=("bool",)),
        "And": OneNode(inputs=_TWO, outputs=("bool",)),
        "BitShift": OneNode(inputs=_TWO, attributes={"direction": "LEFT"}),
        "Clip": OneNode(inputs=_ONE, constants=((T, 0), (T, 1))),
        "PRelu": OneNode(inputs=_ONE, constants=((T, np.ones((4, 6))),)),
        "Dropout": OneNode(inputs=_ONE),
        "Cast": OneNode(inputs=_ONE, outputs=("float32",), attributes={"to": TensorProto.FLOAT}),
        "CastLike": OneNode(inputs=(("float32", _MATRIX), (T, _MATRIX))),
        "Concat": OneNode(inputs=_TWO, attributes={"axis": 0}),
        "Einsum": OneNode(inputs=((T, (4, 6)), (T, (6, 3))), attributes={"equation": "ij,jk->ik"}),
        "MatMul": OneNode(inputs=((T, (4, 6)), (T, (6, 3)))),
        "Gemm": OneNode(inputs=((T, (4, 6)), (T, (6, 3)))),
        "Constant": OneNode(inputs=(), attributes={"value": T}),
        "ConstantOfShape": OneNode(inputs=(("int64", (2,)),), attributes={"value": T}),
        "Expand": OneNode(inputs=((T, (1, 6)),), constants=(_ints(4, 6),)),
        "Reshape": OneNode(inputs=_ONE, constants=(_ints(6, 4),)),
        "Squeeze": OneNode(inputs=((T, (1, 6)),), constants=(_ints(0),)),
        "Unsqueeze": OneNode(inputs=_ONE, constants=(_ints(0),)),
        "Slice": OneNode(inputs=_ONE, constants=(_ints(0), _ints(2), _ints(1))),
        "Split": OneNode(inputs=_ONE, outputs=(T, T), attributes={"axis": 1, "num_outputs": 2}),
        "Tile": OneNode(inputs=_ONE, constants=(_ints(2, 1),)),
        "Pad": OneNode(inputs=_ONE, constants=(_ints(0, 0, 1, 1),)),
        "Where": OneNode(inputs=(("bool", _MATRIX), *_TWO)),
        "Range": OneNode(inputs=((T, ()), (T, ()), (T, ()))),
        "CumSum": OneNode(inputs=_ONE, constants=(_int(1),)),
        "TopK": OneNode(inputs=_ONE, constants=(_ints(2),), outputs=(T, "int64")),
        "Gather": OneNode(inputs=(*_ONE, ("int64", (2,)))),
        "GatherElements": OneNode(inputs=(*_ONE, ("int64", (4, 2))), attributes={"axis": 1}),
        "GatherND": OneNode(inputs=(*_ONE, ("int64", (2, 2)))),
        "Scatter": OneNode(
            inputs=(*_ONE, ("int64", (2, 2)), (T, (2, 2))), opset=10, attributes={"axis": 1}
        ),
        "ScatterElements": OneNode(
            inputs=(*_ONE, ("int64", (2, 2)), (T, (2, 2))), attributes={"axis": 1}
        ),
        "ScatterND": OneNode(inputs=(*_ONE, ("int64", (2, 2)), (T, (2,)))),
        "OneHot": OneNode(inputs=(("int64", (3,)),), constants=(_int(4), (T, [0, 1]))),
        "Compress": OneNode(inputs=(*_ONE, ("bool", (4,))), attributes={"axis": 0}),
        "Unique": OneNode(inputs=((T, _VECTOR),)),
        "ReverseSequence": OneNode(
            inputs=(*_ONE, ("int64", (4,))), attributes={"batch_axis": 0, "time_axis": 1}
        ),
        **_each(
            "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
            "ReduceProd ReduceSum ReduceSumSquare",
            inputs=_ONE,
            constants=(_ints(1),),
        ),
        **_each("DepthToSpace SpaceToDepth", inputs=_PICTURE, attributes={"blocksize": 2}),
        **_each("GlobalAveragePool GlobalMaxPool GlobalLpPool", inputs=_PICTURE),
        **_each("AveragePool MaxPool LpPool", inputs=_PICTURE, attributes={"kernel_shape": [2, 2]}),
        "LRN": OneNode(inputs=_PICTURE, attributes={"size": 3}),
        "MeanVarianceNormalization": OneNode(inputs=_PICTURE),
        "Conv": OneNode(inputs=_PICTURE, constants=(_KERNEL,)),
        "ConvTranspose": OneNode(inputs=_PICTURE, constants=((T, np.ones((8, 4, 3, 3))),)),
        "BatchNormalization": OneNode(inputs=_PICTURE, constants=(_CHANNELS,) * 4),
        "InstanceNormalization": OneNode(inputs=_PICTURE, constants=(_CHANNELS,) * 2),
        "GroupNormalization": OneNode(
            inputs=_PICTURE, constants=((T, np.ones(2)),) * 2, attributes={"num_groups": 2}
        ),
        "LayerNormalization": OneNode(inputs=_ONE, constants=((T, np.ones(6)),) * 2),
        "RMSNormalization": OneNode(inputs=_ONE, constants=((T, np.ones(6)),), opset=23),
        "Resize": OneNode(
            inputs=_PICTURE,
            constants=(None, ("float32", np.array([1.0, 1, 2, 2]))),
            attributes={"mode": "linear"},
        ),
        "Upsample": OneNode(
            inputs=_PICTURE, constants=(("float32", np.array([1.0, 1, 2, 2])),), opset=9
        ),
        "GridSample": OneNode(inputs=(*_PICTURE, (T, (1, 6, 6, 2)))),
        "RoiAlign": OneNode(
            inputs=(*_PICTURE, (T, (2, 4)), ("int64", (2,))),
            attributes={"output_height": 2, "output_width": 2},
        ),
        "NonMaxSuppression": OneNode(
            inputs=((T, (1, 6, 4)), (T, (1, 1, 6))),
            constants=(_ints(2), ("float32", [0.5])),
            outputs=("int64",),
        ),
        "QuantizeLinear": OneNode(
            inputs=_ONE, constants=((T, 0.5), ("int8", 0)), outputs=("int8",)
        ),
        "DequantizeLinear": OneNode(
            inputs=(),
            constants=((T, np.ones((4, 6))), ("float32", 0.5)),
            outputs=("float32",),
            opset=21,
        ),
        "DynamicQuantizeLinear": OneNode(inputs=_ONE, outputs=("uint8", "float32", "uint8")),
        "MatMulInteger": OneNode(inputs=((T, (4, 6)), (T, (6, 3))), outputs=("int32",)),
        "Det": OneNode(inputs=((T, (4, 4)),)),
        "DFT": OneNode(inputs=((T, (1, 6, 1)),)),
        "Col2Im": OneNode(inputs=((T, (1, 4, 4)),), constants=(_ints(4, 4), _ints(2, 2))),
        "Multinomial": OneNode(inputs=_ONE, outputs=("int32",)),
        "Attention": OneNode(inputs=_HEADS, opset=23),
        "RotaryEmbedding": OneNode(
            inputs=(
                (T, (1, 2, 4, 64)),
                (T, (16, 32)),
                (T, (16, 32)),
                ("int64", (1, 4)),
            ),
            opset=23,
        ),
        "TensorScatter": OneNode(
            inputs=((T, (1, 2, 16, 64)), (T, (1, 2, 4, 64)), ("int64", (1,))), opset=24
        ),
        "Swish": OneNode(inputs=_ONE, opset=24),
        "Scan": OneNode(
            inputs=((T, _VECTOR), (T, _MATRIX)),
            outputs=(T, T),
            attributes={"num_scan_inputs": 1},
        ),
        "If": OneNode(
            inputs=(("bool", ()), *_TWO),
            attributes={"then_branch": "x1", "else_branch": "x2"},
        ),
    }
)
