"""Qwen's models in the forms for TensorRT: what their towers give, and that they build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.exporting import ExportOptions, export_model
from gap_export.parity.compare import compare_arrays
from gap_export.spec.requests import EnginesRequest, PruningRequest
from gap_export.spec.tolerances import TOLERANCES
from tests.engines.bundles import SKIP_RTX
from tests.families.qwen_vl.tiny import CANVASES, FAMILIES, make_tiny
from tests.graph.lowering_models import session

pytestmark = pytest.mark.full
# Windows of Qwen2.5-VL reach over the edges of this one.
CANVAS = CANVASES["rows > cols"]
VISION, DECODER = "vision_encoder", "decoder_model_merged"
PREFILL = {
    "num_images": (1, 1, 2),
    "batch_size": (1, 1, 2),
    "sequence_length": (1, 16, 32),
    "past_sequence_length": (0, 0, 0),
    "total_sequence_length": (1, 16, 32),
    "prompt_length": (1, 16, 32),
}
DECODE = {
    **PREFILL,
    "sequence_length": (1, 1, 1),
    "past_sequence_length": (1, 16, 47),
    "total_sequence_length": (2, 17, 48),
}


@pytest.fixture(scope="module", params=["portable", "fused"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(
    request: pytest.FixtureRequest, form: str, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """In float16, with a pruner that reads the last block's attention."""
    folder = tmp_path_factory.mktemp(f"{request.param}-{form}")
    tiny = make_tiny(request.param, folder / "checkpoint", canvas=CANVAS)
    options = ExportOptions(
        model=str(tiny.folder),
        pruning=PruningRequest(pruner="fastervlm-received", keep_ratio=0.3),
        engines=EnginesRequest(targets=("orin",), lowering=form),
        dtype="float16",
        out=folder / "bundle",
    )
    export_model(options)
    return open_bundle(folder / "bundle")


def files_of(bundle: Bundle, component: str) -> dict[str, Path]:
    """A component's graphs by form."""
    return {
        graph.lowering: bundle.file(graph.file)
        for graph in bundle.manifest.graphs
        if graph.component == component
    }


def test_the_lowered_tower_gives_what_the_base_graph_gives(bundle, form):
    files = files_of(bundle, VISION)
    pixels = np.random.default_rng(0).standard_normal((2, 3, *CANVAS)).astype(np.float32)
    found = {}
    for name, file in files.items():
        runner = session(file)
        names = [value.name for value in runner.get_outputs()]
        found[name] = dict(zip(names, runner.run(None, {"pixel_values": pixels}), strict=True))
    base, lowered = found["onnxruntime"], found[form]
    assert np.array_equal(base["keep_indices"], lowered["keep_indices"])
    tolerance = TOLERANCES["float16"]["image_features"]
    truth = base["image_features"]
    atol = tolerance.atol + tolerance.largest_fraction * float(np.abs(truth).max())
    compared = compare_arrays(truth, lowered["image_features"], atol=atol, rtol=tolerance.rtol)
    assert compared.passed, compared
    assert truth.std() > 0.3
    # Tokens differ from each other by more than is tolerated.
    assert np.abs(truth - np.roll(truth, 1, axis=1)).max() > 10 * atol


@pytest.mark.parametrize("component", [VISION, "embed_tokens", DECODER])
def test_every_engine_builds(bundle, form, component):
    pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)
    from tests.engines.sm89 import build_plan

    profiles = (PREFILL, DECODE) if component == DECODER else (PREFILL,)
    assert len(build_plan(files_of(bundle, component)[form], *profiles)) > 1000
