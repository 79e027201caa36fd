"""A bundle whose tower multiplies 8-bit integers says so, is checked as such, or is refused."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import UsageError
from gap_export.exporting import ExportOptions, export_model
from gap_export.parity.int8_tower import use_int8_tower
from gap_export.runtime.session import GroundingSession
from gap_export.spec.requests import EnginesRequest
from tests.parity.checking import failed_outputs, run, statuses


@pytest.fixture(scope="module")
def int8_bundle(tiny_checkpoint, exports):
    return exports.bundle(
        model=str(tiny_checkpoint), pruner="fastervlm", keep_ratio=0.3, vision_dtype="int8"
    )


def test_it_is_in_the_manifest_as_what_it_is_and_holds_no_float_weight_of_a_layer(int8_bundle):
    manifest = open_bundle(int8_bundle).manifest
    kinds = {graph.component: graph.linear_layers for graph in manifest.graphs}
    assert kinds.pop("vision_encoder") == "int8" and set(kinds.values()) == {"float"}
    assert manifest.has_int8_tower and manifest.dtype == "float32"
    sizes = {file.path: file.size for file in manifest.files}
    assert "int8.safetensors" in sizes and "model.safetensors" not in sizes


def test_the_check_passes_beside_a_reference_that_rounds_as_the_graph_does(
    int8_bundle, ask_torch, questions, blind
):
    report = run(int8_bundle, ask_torch(questions))
    assert report.passed, report.to_plain()
    assert "int8" in report.reference


def test_the_check_fails_beside_a_reference_that_rounds_otherwise(
    int8_bundle, ask_torch, questions, blind, monkeypatch
):
    """As a graph would be whose scales are of other layers."""

    def mix_up(reference):
        use_int8_tower(reference)
        for module in reference.vision_encoder.modules():
            if hasattr(module, "scales"):
                module.scales = module.scales.flip(0)

    monkeypatch.setattr("gap_export.parity.int8_tower.use_int8_tower", mix_up)
    report = run(int8_bundle, ask_torch(questions), levels=("tensor",))
    assert statuses(report) == {"tensor": "failed"}
    assert "image_features" in failed_outputs(report)


def test_a_session_answers_close_to_the_float_bundle(int8_bundle, tiny_checkpoint, exports):
    floats = exports.bundle(model=str(tiny_checkpoint), pruner="fastervlm", keep_ratio=0.3)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    seen = []
    for bundle in (int8_bundle, floats):
        with GroundingSession.open(bundle) as session:
            seen.append(session.ground(image, "the red circle").keep_indices)
    assert len(set(seen[0]) & set(seen[1])) >= len(seen[1]) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "rounds float32.*: float16; .*--dtype float32"),
        ({"engines": EnginesRequest(targets=("rtx",))}, "DynamicQuantizeLinear: .*leave out"),
    ],
)
def test_what_cannot_have_such_a_tower_is_refused(tiny_checkpoint, tmp_path, options, message):
    asked = ExportOptions(
        model=str(tiny_checkpoint), vision_dtype="int8", out=tmp_path / "b", **options
    )
    with pytest.raises(UsageError, match=message):
        export_model(asked)
    assert not (tmp_path / "b").exists()
