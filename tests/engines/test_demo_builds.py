"""The proof that needs no GPU: the demo model's engines, in every form, built for SM 89."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.engines.build import build_engines, target_graphs
from gap_export.engines.folder import EngineFolder, read_engine_folder
from gap_export.engines.inspect import check_interface
from gap_export.engines.targets import parse_targets
from gap_export.errors import UsageError
from gap_export.spec.manifest import QuantizationSpec
from tests.engines.bundles import SKIP_RTX, SM89
from tests.engines.gap_walk import assert_rope_sees_remapped_ids
from tests.engines.sm89 import view_component
from tests.shared import SharedExports

pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)

INT4 = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
COMPONENTS = ("vision_encoder", "text_encoder", "embed_tokens", "decoder_model_merged")
DECODER = COMPONENTS[-1]


# By default small models are built, and INT4 decoders at their true shape.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, id="fp16", marks=pytest.mark.full),
        pytest.param(INT4, id="int4", marks=pytest.mark.full),
    ],
)
def exported(request: pytest.FixtureRequest, exports: SharedExports) -> Bundle:
    """The demo model for a desktop card, built by the export itself, and for an Orin, prepared."""
    return open_bundle(
        exports.bundle(
            model="refshapes-llava",
            pruner="text",
            keep_ratio=0.3,
            quantization=request.param,
            targets=("rtx:sm89", "orin"),
        )
    )


@pytest.fixture(scope="module", params=["fused", "portable"])
def bundle(
    exported: Bundle, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """One form of it, built for SM 89: the Orin's graphs build for a desktop card as well."""
    rtx = exported.manifest.target("rtx")
    out = tmp_path_factory.mktemp("demo") / request.param
    if request.param == rtx.lowering:
        return open_bundle(shutil.copytree(exported.path, out))
    targets = (dataclasses.replace(rtx, lowering=request.param),)
    shutil.copytree(exported.path, out, ignore=shutil.ignore_patterns("engines"))
    manifest = dataclasses.replace(exported.manifest, targets=targets)
    bundle = dataclasses.replace(exported, path=out, manifest=manifest)
    build_engines(bundle, SM89)
    return bundle


@pytest.fixture(scope="module")
def folder(bundle: Bundle) -> EngineFolder:
    return read_engine_folder(bundle, "rtx-sm89", verify="full")


def test_every_component_has_an_engine_in_its_place(bundle, folder):
    for component in COMPONENTS:
        path = bundle.path / "engines" / "rtx-sm89" / f"{component}.engine"
        assert path.stat().st_size == folder.engine(component).size > 100_000


def test_the_parsed_network_is_what_the_manifest_says(bundle, folder):
    for graph in target_graphs(bundle.manifest, SM89.target):
        engine = folder.engine(graph.component)
        assert engine.graph == graph.file
        for seen, stated in ((engine.inputs, graph.inputs), (engine.outputs, graph.outputs)):
            assert [(t.name, t.dtype, len(t.shape)) for t in seen] == [
                (t.name, t.dtype, len(t.shape)) for t in stated
            ]
            # A named dimension is left open, a number is that number.
            for tensor, spec in zip(seen, stated, strict=True):
                fixed = [dim for dim in spec.shape if isinstance(dim, int)]
                assert [tensor.shape[i] for i, d in enumerate(spec.shape) if d in fixed] == fixed


def test_rope_sees_what_the_gap_remap_makes_of_position_ids(bundle):
    graph, interface, view = view_component(bundle, DECODER)
    check_interface(interface, graph)
    assert_rope_sees_remapped_ids(view)


def test_the_decoder_has_prefill_and_decode(bundle, folder):
    engine = folder.engine(DECODER)
    assert [profile.name for profile in engine.profiles] == ["prefill", "decode"]
    assert engine.profiles[0].shapes["inputs_embeds"].max[1] == folder.plan.limits.max_prompt
    assert engine.profiles[1].shapes["inputs_embeds"].max[1] == 1


@pytest.mark.full
@pytest.mark.parametrize("generation", ["sm75", "sm80", "sm86", "sm120", "sm121"])
def test_every_generation_builds(bundle, generation):
    (choice,) = parse_targets([f"rtx:{generation}"])
    (decoder,) = target_graphs(bundle.manifest, choice.target, (DECODER,))
    if decoder.quantization is not None and not choice.supports("int4"):
        with pytest.raises(UsageError, match=f"rtx:{generation} takes no int4 weights"):
            build_engines(bundle, choice)
        return
    folder = build_engines(bundle, choice)
    assert [engine.component for engine in folder.plan.engines] == list(COMPONENTS)
