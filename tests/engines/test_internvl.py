"""InternVL in the forms for TensorRT: what its tower gives, what is fused, and that all builds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.exporting import ExportOptions, export_model
from gap_export.parity.compare import compare_arrays
from gap_export.spec.requests import EnginesRequest, PruningRequest
from gap_export.spec.tolerances import TOLERANCES
from tests.engines.bundles import SKIP_RTX
from tests.engines.test_qwen_vl import DECODE, PREFILL, files_of
from tests.families.tiny_internvl import write_internvl
from tests.graph.lowering_models import session

pytestmark = pytest.mark.full
VISION, DECODER = "vision_encoder", "decoder_model_merged"
TILES = {"num_images": (1, 7, 7)}
# Decoder, pruner, form: fastervlm reads the attention of the tower's last block, divprune does not.
CASES = [
    ("qwen2", "fastervlm", "fused"),
    ("qwen3", "divprune", "fused"),
    ("qwen3", "fastervlm", "portable"),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    found: tuple[str, str, str] = request.param
    return found


@pytest.fixture(scope="module")
def bundle(case: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    decoder, pruner, form = case
    folder = tmp_path_factory.mktemp("internvl")
    write_internvl(folder / "checkpoint", decoder=decoder)  # type: ignore[arg-type]
    export_model(
        ExportOptions(
            model=str(folder / "checkpoint"),
            pruning=PruningRequest(pruner=pruner, keep_ratio=0.3),
            engines=EnginesRequest(targets=("orin",), lowering=form),
            dtype="float16",
            out=folder / "bundle",
        )
    )
    return open_bundle(folder / "bundle")


def test_the_lowered_tower_gives_what_the_base_graph_gives(bundle, case):
    pixels = np.random.default_rng(0).standard_normal((7, 3, 32, 32)).astype(np.float32)
    base, lowered = (
        dict(
            zip([value.name for value in runner.get_outputs()], runner.run(None, feed), strict=True)
        )
        for file in (files_of(bundle, VISION)[form] for form in ("onnxruntime", case[2]))
        for runner, feed in [(session(file), {"pixel_values": pixels})]
    )
    assert np.array_equal(base["keep_indices"], lowered["keep_indices"])
    tolerance, truth = TOLERANCES["float16"]["image_features"], base["image_features"]
    atol = tolerance.atol + tolerance.largest_fraction * float(np.abs(truth).max())
    compared = compare_arrays(truth, lowered["image_features"], atol=atol, rtol=tolerance.rtol)
    assert compared.passed, compared
    assert np.abs(truth - np.roll(truth, 1, axis=1)).max() > 10 * atol


def test_every_block_is_fused_but_for_one_that_a_pruner_reads(bundle, case):
    decoder, pruner, form = case
    if form != "fused":
        pytest.skip("portable graphs have no fused attention")
    counts = {
        component: Counter(
            node.op_type
            for node in onnx.load(
                files_of(bundle, component)[form], load_external_data=False
            ).graph.node
        )
        for component in (VISION, DECODER)
    }
    assert counts[VISION]["Attention"] == 3 - (pruner == "fastervlm")
    assert counts[DECODER]["Attention"] == 2
    # Two a layer and the last; Qwen3 has two more a layer, for queries and keys.
    assert counts[DECODER]["RMSNormalization"] == (5 if decoder == "qwen2" else 9)


@pytest.mark.parametrize("component", [VISION, "embed_tokens", DECODER])
def test_every_engine_builds(bundle, case, component):
    pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)
    from tests.engines.sm89 import build_plan

    profiles = (PREFILL | TILES, DECODE) if component == DECODER else (PREFILL | TILES,)
    assert len(build_plan(files_of(bundle, component)[case[2]], *profiles)) > 1000


def test_engines_are_limited_to_the_most_tiles_and_their_tokens(bundle):
    limits = bundle.manifest.engine_limits
    assert limits is not None
    assert limits.max_images == 7
    # 5 of each of 7 tiles; no newlines.
    text = limits.max_prompt - 7 * 5
    assert 0 < text < 300
