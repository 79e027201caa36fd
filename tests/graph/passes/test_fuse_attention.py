from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from gap_export.graph.passes.fuse_attention import FuseAttention
from gap_export.graph.passes.raise_opset import RaiseOpset
from tests.graph.lowering_models import changed, check_declined, kinds, parse, run

RNG = np.random.default_rng(0)
LOWEST = np.array(np.finfo(np.float32).min)
ZERO = np.array(0, np.float32)
SCALE = np.array(0.25, np.float16)

MISSED = "1 places resemble the pattern and do not match it: Softmax .*; use the portable"

PLAIN = """
attention (float16[b, 2, s, 16] q, float16[b, 2, t, 16] k, float16[b, 2, t, 16] v,
           float16 scale) => (float16[b, 2, s, 16] y) {
    turned = Transpose <perm = [0, 1, 3, 2]> (k)
    product = MatMul (q, turned)
    scaled = Mul (product, scale)
    wide = Cast <to = 1> (scaled)
    softmax = Softmax <axis = -1> (wide)
    weights = Cast <to = 10> (softmax)
    y = MatMul (weights, v)
}"""
MASKED = (
    PLAIN.replace("float16 scale)", "float16 scale, bool[s, t] allowed, float zero, float lowest)")
    .replace("softmax = Softmax <axis = -1> (wide)", "bias = Where (allowed, zero, lowest)\n"
             "    masked = Add (wide, bias)\n    softmax = Softmax <axis = -1> (masked)")
)  # fmt: skip
SHARED = (
    PLAIN.replace("[b, 2, s, 16] q", "[b, 4, s, 16] q")
    .replace("[b, 2, s, 16] y", "[b, 4, s, 16] y")
    .replace("turned = Transpose <perm = [0, 1, 3, 2]> (k)", """
    axis = Constant <value = int64[1] {2}> ()
    shape = Constant <value = int64[5] {2, 2, 2, 7, 16}> ()
    flat = Constant <value = int64[4] {2, 4, 7, 16}> ()
    ku = Unsqueeze (k, axis)
    ke = Expand (ku, shape)
    kr = Reshape (ke, flat)
    vu = Unsqueeze (v, axis)
    ve = Expand (vu, shape)
    vr = Reshape (ve, flat)
    turned = Transpose <perm = [0, 1, 3, 2]> (kr)""")
    .replace("MatMul (weights, v)", "MatMul (weights, vr)")
)  # fmt: skip


def plain(*changes: tuple[str, str], text: str = PLAIN) -> ir.Model:
    text = changed(text, *changes)
    masked = {"zero": ZERO, "lowest": LOWEST}
    numbers = {"scale": SCALE} | (masked if "lowest" in text else {})
    return parse(text, **numbers)


def feeds(heads: int = 2, **more: np.ndarray) -> dict[str, np.ndarray]:
    def draw(*shape: int) -> np.ndarray:
        return RNG.standard_normal(shape).astype(np.float16)

    return {"q": draw(2, heads, 5, 16), "k": draw(2, 2, 7, 16), "v": draw(2, 2, 7, 16), **more}


def fused(model: ir.Model) -> ir.Model:
    RaiseOpset().run(model)
    assert FuseAttention().run(model)
    return model


def check_close(found: np.ndarray, truth: np.ndarray) -> None:
    """Weights are at most 1 and are rounded to float16 on either side."""
    np.testing.assert_allclose(
        found.astype(np.float32), truth.astype(np.float32), rtol=0, atol=4 * 2.0**-11
    )


def test_attention_becomes_one_node():
    given = feeds()
    truth = run(plain(), **given)[0]
    model = fused(plain())
    assert kinds(model) == ["Attention"]
    (node,) = model.graph
    assert [value.name for value in node.inputs] == ["q", "k", "v"]
    assert node.attributes["scale"].as_float() == 0.25
    check_close(run(model, **given)[0], truth)
    assert not FuseAttention().run(model)


def test_mask_becomes_a_finite_bias_of_four_axes():
    allowed = np.tril(np.ones((5, 7), bool), 2)
    # A row that may look at nothing must not become NaN.
    allowed[3] = False
    given = feeds(allowed=allowed)
    truth = run(plain(text=MASKED), **given)[0]
    model = fused(plain(text=MASKED))
    assert kinds(model) == ["Where", "Unsqueeze", "Attention"]
    bias = list(model.graph)[-1].inputs[3]
    assert bias.shape.rank() == 4 and bias.dtype == ir.DataType.FLOAT16
    found = run(model, **given)[0]
    assert np.isfinite(found).all()
    seen = [0, 1, 2, 4]
    check_close(found[:, :, seen], truth[:, :, seen])
    blind = run(model, **{**given, "allowed": np.ones((5, 7), bool)})[0]
    assert np.abs(blind - found).max() > 0.1
    assert not FuseAttention().run(model)


def test_bias_that_is_no_mask_is_refused():
    model = plain(
        ("bias = Where (allowed, zero, lowest)", "bias = Cast <to = 1> (allowed)"), text=MASKED
    )
    check_declined(FuseAttention(), model, "a bias that is no mask: bias of Cast")


def test_bias_does_not_overflow_next_to_large_scores():
    given = feeds(allowed=np.tril(np.ones((5, 7), bool)))
    given["q"] = given["q"] * 40
    given["k"] = given["k"] * 40
    truth = run(plain(text=MASKED), **given)[0]
    assert np.isfinite(truth).all()
    check_close(run(fused(plain(text=MASKED)), **given)[0], truth)


def test_layers_share_one_bias():
    body = MASKED[MASKED.index("{") + 1 : MASKED.rindex("}")]
    own = "turned|product|scaled|bias|masked|wide|softmax|weights|y"
    second = re.sub(rf"\b({own})\b", r"\g<1>2", body).replace("MatMul (q", "MatMul (y")
    text = MASKED.replace(body, body + second).replace("16] y)", "16] y2)")
    model = fused(plain(text=text))
    assert kinds(model) == ["Where", "Unsqueeze", "Attention", "Attention"]


def test_a_mask_of_all_queries_is_repeated_for_each():
    keys = np.array([[True, False, True, True, False, True, True]])
    given = feeds(allowed=keys)
    sizes = [("bool[s, t] allowed", "bool[1, t] allowed"), ("b, 2, s, 16] q", "b, 2, 5, 16] q")]
    truth = run(plain(*sizes, text=MASKED), **given)[0]
    model = fused(plain(*sizes, text=MASKED))
    assert kinds(model) == ["Where", "Unsqueeze", "Expand", "Attention"]
    assert list(model.graph[-1].inputs[3].shape)[:3] == [1, 1, 5]
    check_close(run(model, **given)[0], truth)
    # Nor can a pass know how often, where the graph does not say.
    check_declined(FuseAttention(), plain(*sizes[:1], text=MASKED), "masked in another .*None quer")


def test_repeated_heads_are_shared():
    given = feeds(heads=4)
    truth = run(plain(text=SHARED), **given)[0]
    model = fused(plain(text=SHARED))
    assert kinds(model) == ["Attention"]
    check_close(run(model, **given)[0], truth)


def test_heads_that_are_only_reshaped_are_not_repeated():
    """Windows of an image come from a Reshape."""
    given = feeds()
    given["k"] = given["k"].reshape(2, 2, 7, 4, 4)
    model = plain(
        ("float16[b, 2, t, 16] k,", "float16[b, 2, t, 4, 4] k,"),
        ("turned = Transpose <perm = [0, 1, 3, 2]> (k)",
         "shape = Constant <value = int64[4] {2, 2, 7, 16}> ()\n    flat = Reshape (k, shape)\n"
         "    turned = Transpose <perm = [0, 1, 3, 2]> (flat)"),
    )  # fmt: skip
    truth = run(model, **given)[0]
    assert kinds(fused(model))[-2:] == ["Reshape", "Attention"]
    check_close(run(model, **given)[0], truth)


def test_weights_that_somebody_reads_stay():
    model = plain(
        ("=> (float16[b, 2, s, 16] y)", "=> (float16[b, 2, s, 16] y, float16[b, 2, s, t] weights)")
    )
    assert not FuseAttention().run(model)


def test_softmax_that_is_no_attention_stays():
    model = plain(("MatMul (weights, v)", "Neg (weights)"), ("[b, 2, s, 16] y", "[b, 2, s, t] y"))
    assert not FuseAttention().run(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("axis = -1", "axis = 2")], "softmax not over the keys: 2"),
        ([("Mul (product, scale)", "Mul (product, product)")], "scale is not one number: prod"),
        ([("perm = [0, 1, 3, 2]", "perm = [0, 2, 3, 1]"), ("MatMul (q, turned)",
          "MatMul (q, k)\n    other = Neg (turned)")], MISSED),
        ([("perm = [0, 1, 3, 2]", "perm = [1, 0, 3, 2]")], MISSED),
        ([("product = MatMul", "sum = MatMul"), ("Mul (product", "Mul (product"),
          ("    scaled", "    product = Neg (sum)\n    scaled")], MISSED),
        ([(", 16]", ", 8]")], r"no fused kernel for such heads: k?q?.*8\]; allowed: .*16 to 256"),
        ([(", 16]", ", 20]")], "a multiple of 8"),
        ([(", 16]", ", 264]")], "use the portable lowering"),
    ],
)  # fmt: skip
def test_near_miss_is_refused_and_left(changes, message):
    check_declined(FuseAttention(), plain(*changes), message)


@pytest.mark.parametrize(
    ("added", "blocked"), [(0, -np.inf), (0, -10000), (0, 0), (1, np.finfo(np.float32).min)]
)
def test_other_biases_are_refused(added, blocked):
    numbers = {"zero": np.array(added, np.float32), "lowest": np.array(blocked, np.float32)}
    model = parse(MASKED, scale=SCALE, **numbers)
    check_declined(FuseAttention(), model, "masked in another way")


def test_float32_is_refused():
    text = PLAIN.replace("float16", "float").replace("to = 10", "to = 1")
    model = parse(text, scale=SCALE.astype(np.float32))
    check_declined(FuseAttention(), model, "no fused kernel for such heads: q, FLOAT")


def test_heads_repeated_in_another_order_are_refused():
    model = plain(("int64[1] {2}", "int64[1] {1}"), text=SHARED)
    check_declined(FuseAttention(), model, "repeated heads")
