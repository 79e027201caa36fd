from __future__ import annotations

import onnx_ir as ir
import pytest

from gap_export.errors import PassError
from gap_export.graph.passes.check_operators import CheckOperators
from gap_export.graph.passes.insert_gap_remap import InsertGapRemap
from tests.graph.lowering_models import parse

GRAPH = "g (float[n, 4] x) => (float[n, 4] y) {\n    z = Sigmoid (x)\n    y = Mul (x, z)\n}"
FUNCTION = {"Shape", "Sub", "Min", "GatherElements", "Add", "Constant"}


def check(*operators: str, max_opset: int = 20) -> CheckOperators:
    return CheckOperators(lowering="plain", operators=operators, max_opset=max_opset)


def test_graph_of_listed_operators_passes_unchanged():
    assert not check("Sigmoid", "Mul").run(parse(GRAPH))


def test_other_operator_is_refused_with_its_node():
    with pytest.raises(PassError, match=r"no such operator: standard Mul, node Mul_1; .*Sigmoid"):
        check("Sigmoid").run(parse(GRAPH))


def test_newer_opset_is_refused():
    with pytest.raises(PassError, match="opset is not one of the plain form: 20; allowed: <= 19"):
        check("Sigmoid", "Mul", max_opset=19).run(parse(GRAPH))


def test_functions_are_looked_into(small_decoder):
    model = small_decoder()
    InsertGapRemap().run(model)
    assert not check("Neg", *FUNCTION).run(model)
    with pytest.raises(PassError, match="standard GatherElements"):
        check("Neg", *(FUNCTION - {"GatherElements"})).run(model)


def test_operator_of_an_unknown_domain_is_refused():
    model = parse(GRAPH)
    node = ir.Node("com.microsoft", "Gelu", [model.graph.inputs[0]], name="theirs")
    model.graph.append(node)
    with pytest.raises(PassError, match=r"com\.microsoft Gelu, node theirs"):
        check("Gelu", "Sigmoid", "Mul").run(model)
