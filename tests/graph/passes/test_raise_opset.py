from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from gap_export.graph.passes.insert_gap_remap import InsertGapRemap
from gap_export.graph.passes.raise_opset import RaiseOpset
from tests.graph.lowering_models import check_declined, parse, run

GRAPH = "g (float[n, 4] x) => (float[n, 4] y) {\n    z = Sigmoid (x)\n    y = Mul (x, z)\n}"


def test_opset_is_raised_and_results_stay():
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    model = parse(GRAPH)
    before = run(model, x=x)[0]
    assert RaiseOpset().run(model)
    assert model.opset_imports[""] == 24
    np.testing.assert_array_equal(run(model, x=x)[0], before)
    assert not RaiseOpset().run(model)


def test_functions_are_raised_too(small_decoder, run_model):
    model = small_decoder()
    InsertGapRemap().run(model)
    RaiseOpset().run(model)
    (function,) = model.functions.values()
    assert function.opset_imports[""] == 24
    ids = np.array([[0, 1, 2, 3]])
    negative = run_model(
        model, position_ids=ids, attention_mask=ids, kept_positions=np.array([[0, 7]])
    )[1]
    assert negative.tolist() == [[0, -7, -8, -9]]


@pytest.mark.parametrize("opset", [19, 25])
def test_other_opsets_are_refused(opset):
    model = parse(GRAPH)
    model.opset_imports[""] = opset
    check_declined(RaiseOpset(), model, f"this opset: {opset}; allowed: 20 to 24")


def test_unchecked_operator_is_refused_by_name():
    model = parse(GRAPH.replace("Sigmoid", "GroupNormalization"))
    check_declined(RaiseOpset(), model, "GroupNormalization, node GroupNormalization_0")


def test_unchecked_operator_in_a_function_is_refused(small_decoder):
    model = small_decoder()
    InsertGapRemap().run(model)
    (function,) = model.functions.values()
    function.append(ir.node("Resize", [function.outputs[0]]))
    check_declined(RaiseOpset(), model, "Resize")
