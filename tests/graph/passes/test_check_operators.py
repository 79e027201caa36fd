from __future__ import annotations

import onnx_ir as ir
import pytest

from gap_export.errors import PassError
from gap_export.graph.passes.check_operators import check_operators
from gap_export.graph.passes.insert_gap_remap import InsertGapRemap
from tests.graph.lowering_models import parse

GRAPH = "g (float[n, 4] x) => (float[n, 4] y) {\n    z = Sigmoid (x)\n    y = Mul (x, z)\n}"
FUNCTION = {"Shape", "Sub", "Min", "GatherElements", "Add", "Constant"}


def check(model: ir.Model, *operators: str, max_opset: int = 20) -> None:
    check_operators(model, lowering="plain", operators=operators, max_opset=max_opset)


def test_a_graph_of_listed_operators_passes_and_any_other_is_refused():
    check(parse(GRAPH), "Sigmoid", "Mul")
    with pytest.raises(PassError, match=r"no such operator: standard Mul, node Mul_1; .*Sigmoid"):
        check(parse(GRAPH), "Sigmoid")
    with pytest.raises(PassError, match="opset is not one of the plain form: 20; allowed: <= 19"):
        check(parse(GRAPH), "Sigmoid", "Mul", max_opset=19)
    model = parse(GRAPH)
    model.graph.append(ir.Node("com.microsoft", "Gelu", [model.graph.inputs[0]], name="theirs"))
    with pytest.raises(PassError, match=r"com\.microsoft Gelu, node theirs"):
        check(model, "Gelu", "Sigmoid", "Mul")


def test_functions_are_looked_into(small_decoder):
    model = small_decoder()
    InsertGapRemap().run(model)
    check(model, "Neg", *FUNCTION)
    with pytest.raises(PassError, match="standard GatherElements"):
        check(model, "Neg", *(FUNCTION - {"GatherElements"}))
