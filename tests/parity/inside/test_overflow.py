"""Where float16 ends, on either side or on both: named, and no breakdown of the check."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import ParityError
from gap_export.parity.record import record_truth
from gap_export.parity.truth import TorchTruth
from tests.parity.checking import check_with_torch, level_of, statuses
from tests.parity.mutants import DECODER, VISION, rewrite_weight
from tests.parity.test_mutants import questions

FACTOR = 2.0**15
# Our name of a weight, how the checkpoint's ends, and the module that gives what is too large.
PLACES = {
    "decoder": (DECODER, "layers.0.mlp.up_proj.weight", "layers.0.mlp"),
    "tower": (VISION, "tower.encoder.layers.0.mlp.fc1.weight", "tower.encoder.layers.0.mlp.fc1"),
}


@pytest.fixture(scope="module")
def half_bundle(exports, tiny_checkpoint):
    return exports.bundle(
        model=str(tiny_checkpoint), pruner="spatial", keep_ratio=0.3, dtype="float16"
    )


def large_checkpoint(checkpoint, out, ending):
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    (key,) = [
        key for key in tensors if key.endswith(ending) and ("vision" in key) == ("fc1" in ending)
    ]
    tensors[key] = tensors[key] * FACTOR
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def endings(name):
    return ".".join(name.split(".")[-4:])


@pytest.mark.parametrize("sides", ["both", "PyTorch", "the graph"])
@pytest.mark.parametrize("place", PLACES)
def test_the_first_overflow_is_named_with_its_largest_number(
    half_bundle, tiny_recipe, tiny_checkpoint, tmp_path, place, sides
):
    component, name, module = PLACES[place]
    bundle, checkpoint = half_bundle, tiny_checkpoint
    if sides != "PyTorch":
        bundle = rewrite_weight(
            half_bundle, tmp_path / "bundle", component, name, lambda weight: weight * FACTOR
        )
    if sides != "the graph":
        checkpoint = large_checkpoint(tiny_checkpoint, tmp_path / "large", endings(name))
    report = check_with_torch(bundle, tiny_recipe, Checkpoint.of(checkpoint), questions(0))
    assert not report.passed
    assert statuses(report)["tensor"] == statuses(report)["token"] == "failed"
    (found,) = [one for one in report.backends[0].divergences if one.kind == "overflows"]
    assert (found.component, found.allowed) == (component, 65504.0)
    if sides == "the graph":
        assert "PyTorch computes the same call in finite numbers" in found.cause
    else:
        assert found.module.startswith(module) and 65504 < found.max_abs_diff < 1e12
        assert "itself does not compute this model in numbers" in level_of(report, "box").reason
        words = "and in the bundle's graph" if sides == "both" else "graph ends in finite numbers"
        assert words in found.cause
    if sides == "both":
        assert found.operator and found.tensor
    assert "first overflows in" in found.describe()


def test_no_golden_is_recorded_of_what_is_no_number(
    half_bundle, tiny_recipe, tiny_checkpoint, tmp_path
):
    large = large_checkpoint(tiny_checkpoint, tmp_path / "large", "layers.0.mlp.up_proj.weight")
    truth = TorchTruth(tiny_recipe, Checkpoint.of(large), questions(0)[:1])
    with pytest.raises(
        ParityError, match=r"itself does not compute this model in numbers.*first overflows in"
    ):
        record_truth(open_bundle(half_bundle), truth, tmp_path / "golden")
    assert not (tmp_path / "golden").exists()
