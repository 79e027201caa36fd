"""LLaVA-1.5-7B's decoder in its true shape, random weights, cut to two layers: it builds.

By default a quarter as wide, which is as much of a plan's size as can be told apart quickly.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.engines.build import build_engines
from gap_export.engines.plan import EngineSpec
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.recipe import Recipe, find_recipe
from gap_export.spec.requests import EnginesRequest, PruningRequest
from tests.engines.bundles import SKIP_RTX, SM89
from tests.engines.gap_walk import assert_rope_sees_remapped_ids
from tests.engines.sm89 import view_component

pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)

DECODER = "decoder_model_merged"
NUM_LAYERS, HEAD_DIM = 2, 128
INT4 = QuantizationSpec(dtype="int4", block_size=128, method="rtn", lm_head=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder of ``heads`` times 128 numbers, and how its weights are held."""

    heads: int = 32
    inner: int = 11008
    vocabulary: int = 32064
    quantization: QuantizationSpec | None = None

    @property
    def hidden(self) -> int:
        return self.heads * HEAD_DIM

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the plan's weights: at least, and at most."""
        head = 2 * self.hidden * self.vocabulary
        values = NUM_LAYERS * (4 * self.hidden**2 + 3 * self.hidden * self.inner)
        if self.quantization is not None:
            # Half a byte a value, and a float16 scale for every block.
            size = values // 2 + 2 * values // self.quantization.block_size + head
            return size, size
        # TensorRT-RTX 1.7.1 holds float16 weights of layers that share their input (q, k, v; gate,
        # up) in two layouts where prefill and decode have a profile each; it does not with INT4,
        # nor with one profile.
        twice = 2 * NUM_LAYERS * (3 * self.hidden**2 + 2 * self.hidden * self.inner)
        return 2 * values + head, 2 * values + head + twice


SMALL = Case(heads=8, inner=2816, vocabulary=32064, quantization=INT4)
CASES = {"int4": Case(quantization=INT4), "fp16": Case()}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(SMALL, id="small-int4"),
        *(pytest.param(case, id=name, marks=pytest.mark.full) for name, case in CASES.items()),
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    made: Case = request.param
    return made


@pytest.fixture(scope="module")
def bundle(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """It, exported for a desktop card; gone after the tests, as it takes a gigabyte."""
    out = tmp_path_factory.mktemp("true-shape") / "bundle"
    try:
        yield export(recipe_of(case), out, case.quantization)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def recipe_of(case: Case) -> Recipe:
    """LLaVA-1.5-7B's, with two layers in the decoder and three small ones in the tower."""
    whole, _ = find_recipe("llava-1.5-7b")
    shape = whole.architecture
    assert shape is not None
    cut = dataclasses.replace(
        shape,
        decoder=dataclasses.replace(
            shape.decoder,
            num_layers=NUM_LAYERS,
            hidden_size=case.hidden,
            intermediate_size=case.inner,
            num_heads=case.heads,
            num_key_value_heads=case.heads,
            vocab_size=case.vocabulary,
        ),
        projector=dataclasses.replace(shape.projector, width=64, hidden_size=case.hidden),
        vision=dataclasses.replace(
            shape.vision, num_layers=3, width=64, intermediate_size=128, num_heads=2
        ),
    )
    return whole.model_copy(update={"architecture": cut})


def export(recipe: Recipe, out: Path, quantization: QuantizationSpec | None) -> Bundle:
    """The fused graphs and nothing built: the export itself would build all components."""
    from gap_export.exporting import ExportOptions, export_checkpoint

    options = ExportOptions(
        model=recipe.name,
        pruning=PruningRequest(pruner="spatial", keep_ratio=0.3),
        engines=EnginesRequest(targets=("orin",), lowering="fused"),
        out=out,
        random_weights=True,
        quantization=quantization,
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


def test_true_shape_decoder_builds_and_the_plan_is_as_large_as_its_weights(case, engine):
    least, most = case.sizes
    assert engine.quantization == case.quantization
    # Norms, kernels and RoPE's tables take a few MB, whatever the width. Of the small case's INT4
    # weights, one byte a value instead of half of one would be 12 MiB.
    assert least < engine.size < most + max(most // 20, 8 << 20)


def test_true_shape_engine_has_the_true_interface(case, engine):
    shapes = {tensor.name: tensor.shape for tensor in (*engine.inputs, *engine.outputs)}
    assert shapes["inputs_embeds"] == (-1, -1, case.hidden)
    assert shapes["logits"][-1] == case.vocabulary
    caches = [shape for name, shape in shapes.items() if name.startswith("present.")]
    assert [(shape[1], shape[3]) for shape in caches] == [(case.heads, HEAD_DIM)] * 2 * NUM_LAYERS


def test_true_shape_rope_sees_remapped_ids(bundle):
    _, _, view = view_component(bundle, DECODER)
    assert_rope_sees_remapped_ids(view)
