"""Decoders in the true shape of published models, random weights, cut to two layers: they build.

By default LLaVA-1.5-7B's, a quarter as wide, which is as much of a plan's size as can be told apart
quickly, and Qwen3-VL-4B's, an eighth as wide.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.engines.build import build_engines
from gap_export.engines.plan import EngineSpec
from gap_export.spec.architecture import DecoderShape
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
    """A decoder whose heads have 128 numbers, and how its weights are held.

    Attributes:
        hidden: Of its hidden state; None where that is as wide as all heads.
        key_value_heads: None where there are as many as heads.
        more: What else is special of it.
    """

    heads: int = 32
    inner: int = 11008
    vocabulary: int = 32064
    hidden: int | None = None
    key_value_heads: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    quantization: QuantizationSpec | None = None

    @property
    def shape(self) -> DecoderShape:
        """Two layers."""
        plain: dict[str, Any] = {
            "num_layers": NUM_LAYERS,
            "hidden_size": self.hidden or self.heads * HEAD_DIM,
            "intermediate_size": self.inner,
            "num_heads": self.heads,
            "num_key_value_heads": self.key_value_heads or self.heads,
            "head_dim": HEAD_DIM,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
        }
        return DecoderShape(**plain | dict(self.more))

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the plan's weights: at least, and at most."""
        shape = self.shape
        hidden, wide = shape.hidden_size, shape.num_heads * HEAD_DIM
        heads = wide + 2 * shape.num_key_value_heads * HEAD_DIM
        head = 2 * hidden * self.vocabulary
        values = NUM_LAYERS * hidden * (heads + wide + 3 * self.inner)
        if self.quantization is not None:
            # Half a byte a value, and a float16 scale for every block.
            size = values // 2 + 2 * values // self.quantization.block_size + head
            return size, size
        # TensorRT-RTX 1.7.1 holds float16 weights of layers that share their input (q, k, v; gate,
        # up) in two layouts where prefill and decode have a profile each; it does not with INT4,
        # nor with one profile.
        twice = 2 * NUM_LAYERS * hidden * (heads + 2 * self.inner)
        return 2 * values + head, 2 * values + head + twice


QWEN3_VL: Mapping[str, Any] = {
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "rope_sections": (24, 20, 20),
    "rope_interleaved": True,
    "qk_norm": True,
    "num_taps": 1,
}
SMALL = {
    # As in Qwen3-VL-4B, whose heads are together wider than its hidden state.
    "small-int4": Case(
        heads=8, hidden=896, key_value_heads=2, inner=3072, vocabulary=8192, more=QWEN3_VL,
        quantization=INT4,
    ),
}  # fmt: skip
CASES = {
    "int4": Case(quantization=INT4),
    "fp16": Case(),
    "qwen3-vl-4b": Case(
        hidden=2560, key_value_heads=8, inner=9728, vocabulary=151936, more=QWEN3_VL
    ),
    "qwen2.5-vl-7b": Case(
        heads=28,
        key_value_heads=4,
        inner=18944,
        vocabulary=152064,
        more={
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_sections": (16, 24, 24),
            "attention_bias": "qkv",
        },
    ),
}


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(case, id=name) for name, case in SMALL.items()),
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
        decoder=case.shape,
        projector=dataclasses.replace(
            shape.projector, width=64, hidden_size=case.shape.embeds_size
        ),
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
    # weights, one byte a value instead of half of one would be 10 MB.
    assert least < engine.size < most + max(most // 20, 8 << 20)


def test_true_shape_engine_has_the_true_interface(case, engine):
    shapes = {tensor.name: tensor.shape for tensor in (*engine.inputs, *engine.outputs)}
    assert shapes["inputs_embeds"] == (-1, -1, case.shape.embeds_size)
    assert shapes["logits"][-1] == case.vocabulary
    caches = [shape for name, shape in shapes.items() if name.startswith("present.")]
    assert [(shape[1], shape[3]) for shape in caches] == [
        (case.shape.num_key_value_heads, HEAD_DIM)
    ] * 2 * NUM_LAYERS
    axes = (3,) if case.shape.position_axes > 1 else ()
    assert (shapes["position_ids"], shapes["kept_positions"]) == ((-1, -1), (*axes, -1, -1))


def test_true_shape_rope_sees_remapped_ids(bundle):
    _, _, view = view_component(bundle, DECODER)
    assert_rope_sees_remapped_ids(view)
