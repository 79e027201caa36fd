"""Outputs decide, layers inform."""

from __future__ import annotations

import numpy as np

from gap_export.parity.levels.tensor import judge_tensors
from gap_export.parity.tally import tensor_row
from gap_export.spec.tolerances import TOLERANCES

LOGITS = TOLERANCES["float32"]["logits"]


def row(candidate: float, module: str = ""):
    pair = (np.ones((1, 4), np.float32), np.full((1, 4), candidate, np.float32))
    return tensor_row("decoder_model_merged", "logits", [pair], LOGITS, module=module)


def test_outputs_within_tolerance_pass():
    found = judge_tensors([row(1.0), row(1.00001)], note="never told")
    assert found.status == "passed" and not found.reason
    assert found.figures == {"outputs": 2, "failed": 0, "calls": 2}


def test_an_output_beyond_tolerance_fails_by_name():
    found = judge_tensors([row(1.0), row(2.0)], note="nobody knows where")
    assert found.status == "failed"
    assert found.reason == (
        "decoder_model_merged logits: 4 of 4 elements beyond tolerance, worst at (0, 0); "
        "nobody knows where"
    )


def test_a_candidate_that_breaks_down_fails():
    found = judge_tensors([row(1.0)], broken="out of memory")
    assert (found.status, found.reason) == ("failed", "out of memory")


def test_a_layer_beyond_tolerance_is_told_and_does_not_fail():
    found = judge_tensors([row(1.0), row(2.0, module="layers.0.mlp")])
    assert found.status == "passed"
    assert (found.figures["layers"], found.figures["layers_off"]) == (1, 1)
    assert found.figures["outputs"] == 1
