"""Hand-made decoders and vision encoders, a few nodes each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, INT64, BOOL = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL,
)  # fmt: skip
MICROSOFT = "com.microsoft"
CACHE = ["batch", 2, "past", 4]


def value(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model(nodes, inputs, outputs, constants=(), *, opset=18, ir_version=8) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "made", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def to_ir(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(proto)


def angles(*, dtype=FLOAT) -> list[onnx.NodeProto]:
    """From ids to ``cos`` and ``sin`` [batch, sequence, 2], as transformers has it."""
    return [
        helper.make_node("Unsqueeze", ["position_ids", "last"], ["column"], name="column"),
        helper.make_node("Cast", ["column"], ["wide"], name="to_float", to=dtype),
        helper.make_node("Mul", ["wide", "frequencies"], ["half"], name="scaled"),
        helper.make_node("Concat", ["half", "half"], ["angles"], name="both", axis=-1),
        helper.make_node("Cos", ["angles"], ["cos"], name="cosine"),
        helper.make_node("Sin", ["angles"], ["sin"], name="sine"),
    ]


def angle_constants(dtype=np.float32):
    return [constant("last", [-1]), constant("frequencies", np.array([1.0, 0.1], dtype=dtype))]


def interface(*, past=CACHE, layers=2, embeds=(FLOAT, ["batch", "sequence", 8])):
    """Inputs and outputs of a whole decoder beside ``position_ids``."""
    caches = [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]
    inputs = [
        value("inputs_embeds", *embeds),
        value("attention_mask", INT64, ["batch", "total"]),
        *(value(name, FLOAT, past) for name in caches),
    ]
    presents = [name.replace("past_key_values", "present") for name in caches]
    outputs = [
        value("logits", FLOAT, ["batch", "sequence", 16]),
        *(value(name, FLOAT, ["batch", 2, "total", 4]) for name in presents),
    ]
    return inputs, outputs


def write_gqa_decoder(path: Path, *, do_rotary: int) -> None:
    """A decoder of one layer with ONNX Runtime's GroupQueryAttention, as its own tools export it.

    With ``do_rotary`` attention rotates by itself; otherwise RotaryEmbedding reads position_ids.
    Attention is told how many slots of the mask are 1, and nothing else of it.
    """
    random = np.random.default_rng(0)
    width, heads, vocabulary, longest = 32, 2, 125, 256
    head = width // heads

    def weight(name, *shape):
        return constant(name, random.standard_normal(shape).astype(np.float32) / shape[0] ** 0.5)

    steps = np.arange(longest)[:, None] / 100.0 ** (np.arange(head // 2) * 2 / head)[None]
    constants = [
        *(weight(name, width, width) for name in ("q_weight", "k_weight", "v_weight")),
        weight("head_weight", width, vocabulary),
        constant("cos_table", np.cos(steps).astype(np.float32)),
        constant("sin_table", np.sin(steps).astype(np.float32)),
        constant("one", np.array([1], dtype=np.int32)),
        constant("axis", np.array([1])),
        constant("second", np.array(1)),
    ]
    make = helper.make_node
    nodes = [
        make("MatMul", ["inputs_embeds", f"{name}_weight"], [name], name=name) for name in "qkv"
    ]
    rotated = ["q", "k"]
    if not do_rotary:
        rotated = ["q_turned", "k_turned"]
        nodes += [
            make(
                "RotaryEmbedding", [name, "position_ids", "cos_table", "sin_table"],
                [f"{name}_turned"], name=f"{name}_turned", domain=MICROSOFT, num_heads=heads,
                rotary_embedding_dim=0, interleaved=0,
            )
            for name in "qk"
        ]  # fmt: skip
    tables = ["cos_table", "sin_table"] if do_rotary else []
    nodes += [
        make("Cast", ["attention_mask"], ["mask"], name="mask", to=TensorProto.INT32),
        make("ReduceSum", ["mask", "axis"], ["count"], name="count", keepdims=1),
        make("Sub", ["count", "one"], ["seqlens"], name="seqlens"),
        make("Shape", ["attention_mask"], ["mask_shape"], name="mask_shape"),
        make("Gather", ["mask_shape", "second"], ["total_long"], name="total_long", axis=0),
        make("Cast", ["total_long"], ["total_length"], name="total_length", to=TensorProto.INT32),
        make(
            "GroupQueryAttention",
            [*rotated, "v", "past_key_values.0.key", "past_key_values.0.value", "seqlens",
             "total_length", *tables],
            ["attended", "present.0.key", "present.0.value"], name="attention", domain=MICROSOFT,
            num_heads=heads, kv_num_heads=heads, do_rotary=do_rotary,
        ),
        make("Add", ["inputs_embeds", "attended"], ["residual"], name="residual"),
        make("MatMul", ["residual", "head_weight"], ["logits"], name="head"),
    ]  # fmt: skip
    cache = ["batch", heads, "past", head]
    grown = ["batch", heads, "total", head]
    inputs = [
        value("inputs_embeds", FLOAT, ["batch", "sequence", width]),
        value("attention_mask", INT64, ["batch", "total"]),
        value("position_ids", INT64, ["batch", "sequence"]),
        value("past_key_values.0.key", FLOAT, cache),
        value("past_key_values.0.value", FLOAT, cache),
    ]
    outputs = [
        value("logits", FLOAT, ["batch", "sequence", vocabulary]),
        value("present.0.key", FLOAT, grown),
        value("present.0.value", FLOAT, grown),
    ]
    onnx.save(model(nodes, inputs, outputs, constants), path)
