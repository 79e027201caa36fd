"""The table of targets, and what users write to choose from it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gap_export.engines.targets import AUTO, TARGETS, TargetChoice, parse_targets
from gap_export.errors import UsageError
from gap_export.graph.pipelines import FUSED_OPERATORS, LOWERINGS


@pytest.mark.parametrize(
    ("specs", "chosen"),
    [
        ("rtx", "rtx-sm86 rtx-sm89 rtx-sm120"),
        ("orin", "orin-sm87"),
        ("desktop", "desktop"),
        ("rtx:sm89 orin rtx:sm75", "rtx-sm89 orin-sm87 rtx-sm75"),
        ("rtx:sm89 rtx rtx:sm89", "rtx-sm89 rtx-sm86 rtx-sm120"),
        ("", ""),
    ],
)
def test_targets_are_chosen_each_once_in_the_order_given(specs, chosen):
    assert [choice.folder for choice in parse_targets(specs.split())] == chosen.split()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["", "llava", "RTX", "rtx-sm89", "jetson:sm87"],
         "unknown TensorRT target.*rtx, desktop, orin, thor"),
        (["rtx:", "rtx:sm87", "rtx:89", "rtx:sm90", "orin:sm89"], "no such GPU generation.*sm8"),
        (["desktop:sm89"], "write desktop alone"),
    ],
)  # fmt: skip
def test_a_target_or_generation_there_is_not_is_refused(specs, message):
    for spec in specs:
        with pytest.raises(UsageError, match=message):
            parse_targets([spec])


def test_auto_is_every_target():
    assert {choice.target.name for choice in parse_targets([AUTO])} == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_rows_hold_together(target):
    assert set(target.default_compute_capabilities) <= set(target.compute_capabilities)
    assert target.lowering in target.platforms[0].lowerings
    versions = [(p.min_version, p.max_version) for p in target.platforms]
    assert all(low <= high for low, high in versions)
    assert versions == sorted(versions)
    # One TensorRT belongs to one release.
    assert all(a[1] < b[0] for a, b in pairwise(versions))
    for platform in target.platforms:
        assert set(platform.undocumented) <= FUSED_OPERATORS
        # What is noted is the dtype of an operator, or INT4 weights, which raise the opset by one.
        assert ("DequantizeLinear" in platform.undocumented) == (platform.max_opset < 21)
        opsets = [LOWERINGS[name].opset for name in platform.lowerings]
        assert max(opsets) <= max(platform.max_opset, LOWERINGS["portable"].opset)


def test_platform_goes_by_the_version_of_tensorrt():
    orin = TARGETS["orin"]
    assert orin.platform((10, 3)).name == "JetPack 6.2"
    assert orin.platform((11, 4)).name == "JetPack 7.2"
    assert orin.platform((10, 5)) is None
    assert orin.platform((99, 0)) is None


def test_bfloat16_needs_ampere():
    turing = TargetChoice(target=TARGETS["rtx"], compute_capability=75)
    assert turing.supports("float16") and not turing.supports("bfloat16")
    assert TargetChoice(target=TARGETS["rtx"], compute_capability=80).supports("bfloat16")
    assert TargetChoice(target=TARGETS["desktop"], compute_capability=None).supports("bfloat16")
