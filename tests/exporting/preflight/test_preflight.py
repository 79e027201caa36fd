"""The static look at a graph: what it blocks, what it cannot tell, what it finds fine."""

from __future__ import annotations

import os

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from gap_export.engines.targets import TARGETS
from gap_export.errors import BundleError, MissingDependencyError
from gap_export.exporting.preflight import preflight
from gap_export.exporting.trace import save_graph
from gap_export.graph.passes import lower
from gap_export.spec.manifest import GraphSpec

JETPACK_6, JETPACK_7 = TARGETS["orin"].platforms
(RTX,) = TARGETS["rtx"].platforms
GRAPH = GraphSpec(
    component="vision_encoder",
    lowering="portable",
    dtype="float16",
    kv_contract="none",
    file="graph.onnx",
    inputs=(),
    outputs=(),
)


@pytest.fixture
def judge(tmp_path):
    """The verdict on a model."""

    def judge(model: onnx.ModelProto, platform=JETPACK_6):
        onnx.save(model, tmp_path / "graph.onnx")
        return preflight(tmp_path / "graph.onnx", GRAPH, platform)

    return judge


def value(name: str, dtype: str = "float16", shape=("n", 8)):
    return helper.make_tensor_value_info(name, getattr(TensorProto, dtype.upper()), shape)


def model(*nodes, inputs, outputs, initializers=(), opset=20, functions=()):
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    domains = {f.domain for f in functions}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, ir_version=10, opset_imports=imports, functions=list(functions))


def one_op(op: str, *, dtype="float16", out=None, opset=20, domain="", **attributes):
    node = helper.make_node(op, ["x"], ["y"], name="layers.0.it", domain=domain, **attributes)
    made = model(node, inputs=[value("x", dtype)], outputs=[value("y", out or dtype, None)])
    made.opset_import[0].version = opset
    if domain:
        made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


def top_k(k: int, **attributes):
    return model(
        helper.make_node("TopK", ["x", "k"], ["y", "i"], name="top", **attributes),
        inputs=[value("x", shape=("n", 8000))],
        outputs=[value("y", shape=None), value("i", "int64", None)],
        initializers=[helper.make_tensor("k", TensorProto.INT64, [1], [k])],
    )


def attention(opset: int = 23, num_outputs: int = 1):
    names = ["y", "present_key", "present_value"][:num_outputs]
    return model(
        helper.make_node("Attention", ["q", "k", "v"], names, name="layers.0.attn"),
        inputs=[value(n, shape=(1, 2, "s", 64)) for n in "qkv"],
        outputs=[value(n, shape=None) for n in names],
        opset=opset,
    )


def dequantized(opset: int = 21):
    weight = helper.make_tensor("w", TensorProto.INT4, [64, 8], [1] * 512)
    scale = helper.make_tensor("s", TensorProto.FLOAT16, [2, 8], [0.5] * 16)
    return model(
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="dq", axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
        inputs=[value("x", shape=("n", 64))],
        outputs=[value("y", shape=None)],
        initializers=[weight, scale],
        opset=opset,
    )


# -- Blocked --------------------------------------------------------------------------------------


def test_operator_of_a_later_release_is_blocked(judge):
    verdict = judge(attention(opset=20))
    assert (verdict.verdict, verdict.operators) == ("blocked", ("Attention",))
    assert any(
        "1 node layers.0.attn" in r and r.startswith("TensorRT 10.3") for r in verdict.reasons
    )


def test_operator_that_rtx_was_measured_to_refuse_is_blocked(judge):
    verdict = judge(one_op("NonZero", out="int64"), RTX)
    assert (verdict.verdict, verdict.operators) == ("blocked", ("NonZero",))
    # NVIDIA documents it for the full TensorRT, on floats.
    assert judge(one_op("NonZero", out="int64"), JETPACK_6).verdict == "fine"


@pytest.mark.parametrize("platform", [JETPACK_6, JETPACK_7, RTX], ids=lambda p: p.name)
def test_compress_is_blocked_everywhere(judge, platform):
    chosen = model(
        helper.make_node("Compress", ["x", "c"], ["y"], axis=0),
        inputs=[value("x"), value("c", "bool", ("n",))],
        outputs=[value("y", shape=None)],
    )
    assert judge(chosen, platform).verdict == "blocked"


@pytest.mark.parametrize(("k", "expected"), [(3839, "fine"), (3840, "fine"), (3841, "blocked")])
@pytest.mark.parametrize("platform", [JETPACK_6, RTX], ids=lambda p: p.name)
def test_top_k_has_a_largest_k(judge, k, expected, platform):
    assert judge(top_k(k), platform).verdict == expected


def test_top_k_of_a_constant_node_is_read_too(judge):
    made = top_k(4000)
    constant = helper.make_node("Constant", [], ["k"], value_ints=[4000])
    made.graph.node.insert(0, constant)
    del made.graph.initializer[:]
    assert judge(made).operators == ("TopK",)


def test_unsorted_top_k_is_blocked_as_documented(judge):
    assert judge(top_k(5, sorted=0)).verdict == "blocked"
    assert judge(top_k(5, sorted=0), RTX).verdict == "fine"


def test_second_output_of_attention_is_blocked(judge):
    assert judge(attention(), JETPACK_7).verdict == "fine"
    verdict = judge(attention(num_outputs=3), JETPACK_7)
    assert verdict.verdict == "blocked"
    assert any("1 output" in reason for reason in verdict.reasons)


def test_axis_made_at_run_time_is_blocked(judge):
    made = model(
        helper.make_node("ReduceSum", ["x", "axes"], ["y"]),
        inputs=[value("x"), value("axes", "int64", (1,))],
        outputs=[value("y", shape=None)],
    )
    verdict = judge(made)
    assert (verdict.verdict, verdict.operators) == ("blocked", ("ReduceSum",))


def test_axis_computed_from_constants_is_fine(judge):
    made = model(
        helper.make_node("Add", ["one", "one"], ["axes"]),
        helper.make_node("ReduceSum", ["x", "axes"], ["y"]),
        inputs=[value("x", shape=("n", 8, 8))],
        outputs=[value("y", shape=None)],
        initializers=[helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    assert judge(made).verdict == "fine"


def test_opset_that_nobody_knows_is_blocked(judge):
    verdict = judge(one_op("Relu", opset=25))
    assert (verdict.verdict, verdict.operators) == ("blocked", ())
    assert any("opset 25, documented are 9 to 20" in reason for reason in verdict.reasons)
    assert judge(one_op("Relu", opset=8)).verdict == "blocked"


@pytest.mark.parametrize("dtype", ["string", "uint16", "complex64"])
def test_dtype_that_tensorrt_has_not_got_is_blocked(judge, dtype):
    verdict = judge(one_op("Identity", dtype=dtype))
    assert verdict.verdict == "blocked"
    assert any(dtype in reason for reason in verdict.reasons)


def test_integers_where_rtx_was_measured_to_take_none_are_blocked(judge):
    assert judge(one_op("IsNaN", dtype="float16", out="bool"), RTX).verdict == "fine"
    assert judge(one_op("Softplus", dtype="int64"), RTX).operators == ("Softplus",)


def test_operator_inside_a_branch_is_seen(judge):
    def branch(op: str) -> onnx.GraphProto:
        inner = helper.make_node(op, ["x"], [f"y_{op}"], name=f"inner_{op}")
        return helper.make_graph([inner], op, [], [value(f"y_{op}", shape=None)])

    made = model(
        helper.make_node("If", ["c"], ["y"], then_branch=branch("Det"), else_branch=branch("Relu")),
        inputs=[value("c", "bool", ()), value("x")],
        outputs=[value("y", shape=None)],
    )
    assert "Det" in judge(made).operators


def test_operator_inside_a_function_is_seen(judge):
    body = helper.make_node("Det", ["a"], ["b"], name="inside")
    function = helper.make_function(
        "ours", "F", ["a"], ["b"], [body], [helper.make_opsetid("", 20)]
    )
    made = model(
        helper.make_node("F", ["x"], ["y"], domain="ours", name="call"),
        inputs=[value("x")],
        outputs=[value("y", shape=None)],
        functions=[function],
    )
    assert judge(made).operators == ("Det",)


def test_graph_without_outputs_is_blocked_by_trtcheck(judge):
    made = one_op("Relu")
    del made.graph.output[:]
    verdict = judge(made)
    assert verdict.verdict == "blocked"
    assert any("trtcheck 1." in reason for reason in verdict.reasons)


# -- Unverified -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (one_op("MatMulNBits", domain="com.microsoft"), "com.microsoft::MatMulNBits"),
        (one_op("Frobnicate"), "Frobnicate"),
        (one_op("Swish", opset=21), "Swish"),
    ],
)
def test_operator_that_nobody_knows_is_unverified(judge, made, name):
    verdict = judge(made)
    assert (verdict.verdict, verdict.operators) == ("unverified", (name,))
    assert any(f"nobody vouches for {name}" in reason for reason in verdict.reasons)


def test_dtype_out_of_the_documentation_is_unverified(judge):
    made = model(
        helper.make_node("CumSum", ["x", "axis"], ["y"], name="sum"),
        inputs=[value("x", "int64")],
        outputs=[value("y", "int64", None)],
        initializers=[helper.make_tensor("axis", TensorProto.INT64, [], [1])],
    )
    verdict = judge(made)
    assert (verdict.verdict, verdict.operators) == ("unverified", ("CumSum",))
    assert judge(made, RTX).verdict == "fine"


def test_int4_weights_are_unverified_on_the_release_that_documents_opset_20(judge):
    verdict = judge(dequantized())
    assert (verdict.verdict, verdict.operators) == ("unverified", ("DequantizeLinear",))
    assert any("opset 21, documented are 9 to 20" in reason for reason in verdict.reasons)
    assert judge(dequantized(), JETPACK_7).verdict == "fine"
    assert judge(dequantized(), RTX).verdict == "fine"


def test_operator_that_changed_only_in_its_dtypes_is_not_listed(judge):
    made = one_op("Transpose", opset=21)
    verdict = judge(made)
    assert (verdict.verdict, verdict.operators) == ("unverified", ())


def test_float64_is_unverified(judge):
    assert judge(one_op("Identity", dtype="double")).verdict == "unverified"


# -- Fine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", [JETPACK_6, JETPACK_7, RTX], ids=lambda p: p.name)
@pytest.mark.parametrize(
    ("component", "pruner"),
    [
        ("vision_encoder", "text"),
        ("vision_encoder", "spatial"),
        ("vision_encoder", "fastervlm"),
        ("text_encoder", "text"),
        ("embed_tokens", "spatial"),
        ("decoder_model_merged", "spatial"),
    ],
)
def test_base_graphs_are_fine(tiny_graphs, component, pruner, platform):
    verdict = preflight(tiny_graphs.path(component, pruner, 0.3), GRAPH, platform)
    assert (verdict.verdict, verdict.operators) == ("fine", ()), verdict.reasons


@pytest.mark.parametrize(
    ("component", "pruner"),
    [("vision_encoder", "text"), ("text_encoder", "text"), ("decoder_model_merged", "spatial")],
)
def test_portable_graphs_are_fine(tiny_graphs, tmp_path, component, pruner):
    base = ir.load(tiny_graphs.path(component, pruner, 0.3))
    save_graph(lower(base, component, "portable"), tmp_path / "graph.onnx")
    verdict = preflight(tmp_path / "graph.onnx", GRAPH, JETPACK_6)
    assert (verdict.verdict, verdict.operators) == ("fine", ()), verdict.reasons


def test_contradiction_of_the_two_is_told(judge):
    # trtcheck has K < 3840; the layer's own page K <= 3840.
    verdict = judge(top_k(3840))
    assert verdict.verdict == "fine"
    assert any("trtcheck" in r and "say otherwise" in r for r in verdict.reasons)


def test_what_trtcheck_does_not_know_is_told(judge):
    verdict = judge(one_op("Cos"))
    assert verdict.verdict == "fine"
    assert any("does not know Cos" in reason for reason in verdict.reasons)


# -- The file -------------------------------------------------------------------------------------


def test_weights_are_never_touched(judge, tmp_path, monkeypatch):
    """Nor looked for: a link, a missing file and a path out of the folder are all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(32))
    os.link(tmp_path / "weights.bin", tmp_path / "linked.bin")
    for location in ("linked.bin", "missing.bin", "../../outside.bin"):
        weight = helper.make_tensor("w", TensorProto.FLOAT16, [8, 8], bytes(128), raw=True)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
        made = model(
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            inputs=[value("x")],
            outputs=[value("y", shape=None)],
            initializers=[weight],
        )
        before = made.SerializeToString()
        assert judge(made).verdict == "fine"
        assert (tmp_path / "graph.onnx").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a\x3a\xff"])
def test_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="not an ONNX file"):
        preflight(path, GRAPH, JETPACK_6)
    with pytest.raises(BundleError, match="not an ONNX file"):
        preflight(tmp_path / "missing.onnx", GRAPH, JETPACK_6)


def test_without_trtcheck_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("gap_export.extras._is_installed", lambda name: name != "trtcheck")
    with pytest.raises(MissingDependencyError, match=r"trtcheck.*pip install .*\[export\]"):
        preflight(tmp_path / "graph.onnx", GRAPH, JETPACK_6)
