"""LLaVA-1.5-7B's decoder in its true shape, random weights, cut to two layers: it builds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.engines.build import build_engines
from gap_export.engines.plan import EngineSpec
from gap_export.manifest import QuantizationSpec
from gap_export.recipe import Recipe, find_recipe
from gap_export.source import Checkpoint
from tests.engines.bundles import SKIP_RTX, SM89
from tests.engines.gap_walk import assert_rope_sees_remapped_ids
from tests.engines.sm89 import view_component

pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)

DECODER = "decoder_model_merged"
HIDDEN, INNER, VOCABULARY = 4096, 11008, 32064
NUM_LAYERS = 2
HEAD_BYTES = 2 * HIDDEN * VOCABULARY
LINEAR_VALUES = NUM_LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
INT4 = QuantizationSpec(dtype="int4", block_size=128, method="rtn", lm_head=False)
# Half a byte a value, and a float16 scale for every block.
INT4_BYTES = LINEAR_VALUES // 2 + 2 * LINEAR_VALUES // 128
# TensorRT-RTX 1.7.1 holds float16 weights of layers that share their input (q, k, v; gate, up) in
# two layouts where prefill and decode have a profile each; it does not with INT4, nor with one
# profile.
SECOND_LAYOUT_BYTES = 2 * NUM_LAYERS * (3 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """LLaVA-1.5-7B's, with fewer layers: two in the decoder, three in the tower."""
    whole, _ = find_recipe("llava-1.5-7b")
    shape = whole.architecture
    assert shape is not None
    cut = dataclasses.replace(
        shape,
        decoder=dataclasses.replace(shape.decoder, num_layers=NUM_LAYERS),
        vision=dataclasses.replace(shape.vision, num_layers=3),
    )
    return whole.model_copy(update={"architecture": cut})


@pytest.fixture(
    scope="module",
    params=[INT4, pytest.param(None, marks=pytest.mark.full)],
    ids=["int4", "fp16"],
)
def bundle(
    recipe: Recipe, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bundle]:
    """It, exported for a desktop card; gone after the tests, as it takes a gigabyte."""
    out = tmp_path_factory.mktemp("true-shape") / "bundle"
    try:
        yield export(recipe, out, request.param)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def export(recipe: Recipe, out: Path, quantization: QuantizationSpec | None) -> Bundle:
    """The fused graphs and nothing built: the export itself would build all components."""
    from gap_export.pipeline import ExportOptions, export_checkpoint

    options = ExportOptions(
        model=recipe.name,
        pruner="spatial",
        keep_ratio=0.3,
        out=out,
        random_weights=True,
        quantization=quantization,
        # An Orin's engines are built elsewhere, so that here they are prepared alone.
        targets=("orin",),
        lowering="fused",
    )
    export_checkpoint(recipe, Checkpoint(parts={}, random_seed=0), options)
    exported = open_bundle(out)
    orin = exported.manifest.target("orin")
    targets = (dataclasses.replace(orin, name=SM89.target.name, preflight=()),)
    return dataclasses.replace(
        exported, manifest=dataclasses.replace(exported.manifest, targets=targets)
    )


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> EngineSpec:
    folder = build_engines(bundle, SM89, only=(DECODER,))
    return folder.engine(DECODER)


def test_true_shape_decoder_builds_and_the_plan_is_as_large_as_its_weights(engine):
    if engine.quantization is not None:
        least = most = INT4_BYTES + HEAD_BYTES
    else:
        least = 2 * LINEAR_VALUES + HEAD_BYTES
        most = least + SECOND_LAYOUT_BYTES
    # Norms, kernels and RoPE's tables take a few MB.
    assert least < engine.size < 1.05 * most


def test_true_shape_engine_has_the_true_interface(engine):
    shapes = {tensor.name: tensor.shape for tensor in (*engine.inputs, *engine.outputs)}
    assert shapes["inputs_embeds"] == (-1, -1, HIDDEN)
    assert shapes["logits"][-1] == VOCABULARY
    caches = [shape for name, shape in shapes.items() if name.startswith("present.")]
    assert [(shape[1], shape[3]) for shape in caches] == [(32, 128)] * 2 * NUM_LAYERS


def test_true_shape_rope_sees_remapped_ids(bundle):
    _, view = view_component(bundle, DECODER)
    assert_rope_sees_remapped_ids(view)
