"""What a request for weights comes to, and which ones contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest

from gap_export.errors import UsageError
from gap_export.spec.requests import WeightsRequest
from gap_export.spec.tolerances import TOLERANCES, tolerances_of


@pytest.mark.parametrize(
    ("given", "dtype", "activations"),
    [
        ({}, None, "float"),
        ({"runs_on": "cpu"}, "float32", "float"),
        ({"runs_on": "cpu", "dtype": "float32"}, "float32", "float"),
        ({"dtype": "int4"}, None, "int8"),
        ({"dtype": "int4", "runs_on": "cpu"}, "float32", "int8"),
        ({"dtype": "int4", "activations": "float"}, None, "float"),
    ],
)
def test_request_is_resolved(given: dict[str, Any], dtype, activations):
    resolved = WeightsRequest(**given).resolve()
    assert (resolved.dtype, resolved.activations) == (dtype, activations)
    assert (resolved.quantization is not None) == (given.get("dtype") == "int4")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_that_a_cpu_casts_is_refused_for_a_cpu(dtype):
    with pytest.raises(UsageError, match=f"--dtype {dtype} --for cpu"):
        WeightsRequest(dtype=dtype, runs_on="cpu").resolve()


def test_activations_without_int4_are_refused():
    with pytest.raises(UsageError, match="--activations is about quantized weights"):
        WeightsRequest(dtype="float32", activations="float").resolve()


def test_int8_activations_widen_the_tolerance_of_logits_alone():
    plain, wide = TOLERANCES["float16"], tolerances_of("float16", "int8")
    assert tolerances_of("float16") == plain
    assert {name for name in plain if wide[name] != plain[name]} == {"logits"}
    # A constant off by a tenth of the largest logit is no rounding.
    assert plain["logits"].largest_fraction < wide["logits"].largest_fraction < 0.1
