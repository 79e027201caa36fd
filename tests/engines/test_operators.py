"""The table of operators: its rows for TensorRT-RTX against TensorRT-RTX, the others against it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gap_export.engines.operators import RELEASES, Release, oldest_release
from gap_export.engines.targets import TARGETS
from gap_export.graph.lowering import FUSED_OPERATORS, PORTABLE_OPERATORS
from tests.engines.one_node import NODES, make_model

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "bool")
BY_VERSION = {release.version: release for release in RELEASES}
RTX = BY_VERSION[1, 7]
PLATFORMS = [platform for target in TARGETS.values() for platform in target.platforms]


@pytest.fixture(scope="module")
def builds():
    """Whether TensorRT-RTX builds an operator on a dtype, for SM 89."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    if not trt.__version__.startswith("1.7."):
        pytest.skip(f"the table is of TensorRT-RTX 1.7, here is {trt.__version__}")

    class Silent(trt.ILogger):
        def log(self, severity, message):
            """What it says is not looked at."""

    logger = Silent()
    builder = trt.Builder(logger)

    def build(operator: str, dtype: str) -> bool:
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        model = make_model(operator, dtype)
        if not parser.parse(model.SerializeToString()):
            return False
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        config.builder_optimization_level = 0
        profile = builder.create_optimization_profile()
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        shapes = [tensor for tensor in tensors if tensor.is_shape_tensor]
        for tensor in shapes:
            count = max(1, *tensor.shape, 1)
            profile.set_shape_input(tensor.name, [2] * count, [3] * count, [4] * count)
        if shapes:
            config.add_optimization_profile(profile)
        return builder.build_serialized_network(network, config) is not None

    return build


def check_row(builds, operator: str, dtypes: tuple[str, ...]) -> None:
    taken = RTX.operators[operator].dtypes
    assert [d for d in dtypes if builds(operator, d)] == [d for d in dtypes if d in taken], operator


@pytest.mark.parametrize("operator", sorted(set(RTX.operators) - {"DequantizeLinear"}))
def test_row_is_what_rtx_builds_on_one_float_and_one_integer(builds, operator):
    check_row(builds, operator, ("float16", "int64"))


@pytest.mark.full
@pytest.mark.parametrize("operator", sorted(set(RTX.operators) - {"DequantizeLinear"}))
def test_row_is_what_rtx_builds(builds, operator):
    check_row(builds, operator, DTYPES)


def test_rtx_dequantizes_what_its_row_says(builds):
    check_row(builds, "DequantizeLinear", (*DTYPES, "int8", "uint8", "int4"))


def test_every_row_of_rtx_has_a_model_to_measure_it():
    assert set(RTX.operators) == set(NODES)


def test_newer_release_takes_all_that_an_older_one_takes():
    versions = sorted(v for v in BY_VERSION if v >= (10, 0))
    for old, new in pairwise(versions):
        for name, row in BY_VERSION[old].operators.items():
            assert set(row.dtypes) <= set(BY_VERSION[new].operators[name].dtypes), (name, new)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("Attention", (10, 15)),
        ("RotaryEmbedding", (10, 15)),
        ("RMSNormalization", (10, 15)),
        ("TensorScatter", (10, 15)),
        ("STFT", (10, 13)),
    ],
)
def test_operator_is_refused_before_the_release_that_brought_it(name, first):
    # Of the releases in the table; Attention came with 10.14.
    assert (
        min(v for v, r in BY_VERSION.items() if v > (10, 0) and r.operators[name].dtypes) == first
    )


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: p.name)
def test_platform_has_a_release_of_its_own_library_no_newer_than_it(platform):
    release = oldest_release(platform)
    assert release.version <= platform.min_version
    assert (release.version < (10, 0)) == (platform.min_version < (10, 0))
    assert platform.max_opset <= release.known_opset


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_every_release_takes_the_portable_operators(release: Release):
    assert [name for name in PORTABLE_OPERATORS if not release.operators[name].dtypes] == []


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: p.name)
def test_platform_of_the_fused_lowering_takes_its_operators(platform):
    rows = oldest_release(platform).operators
    refused = [name for name in FUSED_OPERATORS if not rows[name].dtypes]
    assert (refused == []) == ("fused" in platform.lowerings)


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_rules_speak_of_what_a_release_takes(release: Release):
    for name, row in release.operators.items():
        if not row.dtypes:
            continue
        assert all(isinstance(dtype, str) for dtype in row.dtypes), name
        assert not set(row.constants) & set(row.absent), name
