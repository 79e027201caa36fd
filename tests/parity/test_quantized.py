"""A quantized bundle is compared with its own weights, and these with the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import (
    QUANTIZED_NAME,
    DerivedWeight,
    Weight,
    dequantize,
    read_header,
    store_quantized,
)
from gap_export.errors import BundleError
from gap_export.exporting import ExportOptions, export_model
from gap_export.exporting.quantization import SCALES_NAME, linear_keys
from gap_export.families import Reference, build_reference, resolve_pruning
from gap_export.parity import check as check_module
from gap_export.parity import quantized
from gap_export.parity.inside.look import Inside
from gap_export.parity.quantized import use_quantized_weights
from gap_export.parity.question import Question
from gap_export.parity.results import CheckReport
from gap_export.progress import SilentProgress
from gap_export.spec.manifest import EngineLimits, QuantizationSpec
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest
from gap_export.spec.tolerances import COMPUTED_WEIGHT
from tests.parity.checking import check_with_torch, failed_outputs, outputs
from tests.parity.mutants import rewrite
from tests.runtime.backends.fake_tensorrt import copy_bundle, use_fakes, write_engines
from tests.shared import SharedExports

DECODER = "decoder_model_merged"
LOGITS = {"logits (prefill)", "logits (decode)", "logits (padded batch)"}
FIRST, SECOND = (f"{DECODER}.layers.{i}.self_attn.q_proj.weight" for i in range(2))
ROUNDED = "int4 weights"
Questions = list[Question]
Export = Callable[..., Path]


def spec(method: str = "rtn", *, block_size: int = 32) -> QuantizationSpec:
    assert method in ("rtn", "awq")
    return QuantizationSpec(dtype="int4", block_size=block_size, method=method, lm_head=False)


@pytest.fixture(scope="module")
def questions() -> Questions:
    rng = np.random.default_rng(0)
    return [
        Question(image=rng.integers(0, 256, (40, 32, 3), dtype=np.uint8), expression=text)
        for text in ("the red circle", "the big blue square")
    ]


@pytest.fixture(scope="module")
def export(
    tiny_checkpoint: Path,
    exports: SharedExports,
    questions: Questions,
    tmp_path_factory: pytest.TempPathFactory,
) -> Export:
    """Bundles of the tiny model, each made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(method: str = "rtn", dtype: str = "float32") -> Path:
        if (method, dtype) == ("rtn", "float32"):
            return exports.bundle(
                model=str(tiny_checkpoint), keep_ratio=0.3, quantization=spec("rtn")
            )
        if (method, dtype) not in made:
            samples = tuple((q.image, q.expression) for q in questions)
            options = ExportOptions(
                model=str(tiny_checkpoint),
                pruning=PruningRequest(keep_ratio=0.3),
                out=tmp_path_factory.mktemp("quantized") / "bundle",
                dtype=dtype,
                quantization=spec(method),
                calibration=samples if method == "awq" else None,
            )
            made[method, dtype] = export_model(options).bundle
        return made[method, dtype]

    return make


@pytest.fixture
def check(
    tiny_recipe: Recipe,
    tiny_checkpoint: Path,
    questions: Questions,
    monkeypatch: pytest.MonkeyPatch,
):
    # Where a difference begins is looked for, and tested, elsewhere.
    monkeypatch.setattr(check_module, "look_inside", lambda *_, **__: Inside())

    def run(bundle: Path, **given: Any) -> CheckReport:
        source = Checkpoint.of(tiny_checkpoint)
        return check_with_torch(bundle, tiny_recipe, source, questions, **given)

    return run


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("rtn", "float32"),
        pytest.param("awq", "float32", marks=pytest.mark.full),
        ("awq", "float16"),
    ],
)
def test_an_honest_bundle_passes_and_the_report_says_whose_weights(export, check, method, dtype):
    report = check(export(method, dtype))
    assert report.passed, report.to_plain()
    assert "with the bundle's own INT4 weights in blocks of 32" in report.reference
    assert report.to_plain()["reference"] == report.reference
    (compared,) = [row for row in outputs(report) if row.tensor == ROUNDED]
    assert (compared.calls, compared.max_abs_diff) == (14, 0)
    assert ("AWQ" in report.reference) is (method == "awq")


def test_engines_of_int4_weights_are_compared_with_the_same_weights(
    export, check, tmp_path, monkeypatch
):
    bundle = copy_bundle(export(), tmp_path / "bundle")
    write_engines(bundle, EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=1, max_images=1))
    use_fakes(monkeypatch)
    report = check(bundle.path, backends=("trt",))
    assert report.passed, report.to_plain()
    assert "INT4 weights" in report.reference


def test_a_float_bundle_is_compared_with_the_checkpoint_s_weights(tiny_bundle, check):
    report = check(tiny_bundle)
    assert report.passed
    assert report.reference.endswith("(CPU)")


def test_without_the_bundle_s_weights_the_comparison_fails(export, check, monkeypatch):
    monkeypatch.setattr(quantized, "use_quantized_weights", lambda *_, **__: ())
    assert failed_outputs(check(export())).keys() == LOGITS


def flip_a_bit(folder: Path) -> None:
    edit(folder, f"{FIRST}.int4", lambda raw: bytes([raw[0] ^ 1]) + raw[1:])


def double_a_scale(folder: Path) -> None:
    edit(folder, f"{FIRST}.scales.float32", lambda raw: times_two(raw[:4]) + raw[4:])


def swap_two_layers(folder: Path) -> None:
    for kind in ("int4", "scales.float32"):
        names = f"{FIRST}.{kind}", f"{SECOND}.{kind}"
        one, other = (read(folder, name) for name in names)
        edit(folder, names[0], lambda _, new=other: new)
        edit(folder, names[1], lambda _, new=one: new)


def times_two(raw: bytes) -> bytes:
    return (np.frombuffer(raw, np.float32) * 2).tobytes()


def read(folder: Path, name: str, file: str = QUANTIZED_NAME) -> bytes:
    ref = read_header(folder / file)[name]
    return (folder / file).read_bytes()[ref.offset : ref.offset + ref.length]


def edit(
    folder: Path, name: str, change: Callable[[bytes], bytes], within: str = QUANTIZED_NAME
) -> None:
    ref = read_header(folder / within)[name]
    new = change(read(folder, name, within))
    assert len(new) == ref.length
    with (folder / within).open("r+b") as file:
        file.seek(ref.offset)
        file.write(new)


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip_a_bit, "1 of 1024 values and 0 of 32 scales differ"),
        (double_a_scale, "values and 1 of 32 scales differ"),
        (swap_two_layers, "scales differ"),
    ],
)
def test_weights_that_the_checkpoint_does_not_round_to_fail(
    export, check, tmp_path, change, said, method
):
    report = check(rewrite(export(method), tmp_path / "changed", edit_folder=change))
    assert not report.passed
    # The graph computes with these weights as well as any: only the checkpoint tells.
    (reason,) = failed_outputs(report).values()
    assert reason.startswith(FIRST.removeprefix(f"{DECODER}."))
    assert said in reason


def halve_a_channel(folder: Path) -> None:
    """In all that read the norm: what the file says could be true."""
    for layer in ("q_proj", "k_proj", "v_proj"):
        name = f"{DECODER}.layers.1.self_attn.{layer}.input_scale"
        edit(folder, name, lambda raw: half(raw[:4]) + raw[4:], SCALES_NAME)


def half(raw: bytes) -> bytes:
    return (np.frombuffer(raw, np.float32) / 2).tobytes()


def test_channels_scaled_by_something_else_than_the_bundle_says_fail(export, check, tmp_path):
    report = check(rewrite(export("awq"), tmp_path / "changed", edit_folder=halve_a_channel))
    reasons = failed_outputs(report)
    assert reasons[ROUNDED].startswith("layers.1.self_attn.q_proj.weight is not what")
    # Nor does the norm that undoes the scaling fit.
    assert "logits (prefill)" in reasons


def test_a_norm_that_does_not_undo_the_scaling_fails(export, check, tmp_path):
    def double(folder: Path) -> None:
        name = f"{DECODER}.layers.0.input_layernorm.weight"
        edit(folder, name, times_two, "converted.safetensors")

    report = check(rewrite(export("awq"), tmp_path / "changed", edit_folder=double))
    assert failed_outputs(report).keys() == LOGITS


def test_scaled_weights_without_their_scales_are_refused(export, check, tmp_path):
    def lose(folder: Path) -> None:
        (folder / SCALES_NAME).unlink()

    bundle = rewrite(export("awq"), tmp_path / "changed", edit_folder=lose)
    with pytest.raises(BundleError, match=r"scaled by: no awq\.safetensors; export the bundle"):
        check(bundle)


def test_a_graph_that_reads_another_layer_s_weights_fails(export, check, tmp_path):
    def swap(folder: Path) -> None:
        path = folder / "decoder_model_merged.onnx"
        model = onnx.load(path, load_external_data=False)
        by_name = {tensor.name: tensor for tensor in model.graph.initializer}
        one, other = (
            by_name[f"{name.removeprefix(f'{DECODER}.')}.int4"] for name in (FIRST, SECOND)
        )
        mine, theirs = ([(e.key, e.value) for e in t.external_data] for t in (one, other))
        for tensor, entries in ((one, theirs), (other, mine)):
            del tensor.external_data[:]
            for key, value in entries:
                tensor.external_data.add(key=key, value=value)
        onnx.save(model, path)

    report = check(rewrite(export(), tmp_path / "changed", edit_folder=swap))
    assert failed_outputs(report).keys() == LOGITS


@pytest.fixture
def reference(tiny_recipe: Recipe, tiny_checkpoint: Path) -> Reference:
    pruning = resolve_pruning(
        tiny_recipe, PruningRequest(pruner="spatial", keep_ratio=0.3, order="raster")
    )
    return build_reference(tiny_recipe, Checkpoint.of(tiny_checkpoint), pruning, device="cpu")


def weights_of(reference: Reference) -> dict[str, Weight]:
    component = reference.component(DECODER)
    return {
        f"{DECODER}.{key}": component.weight_refs[key]
        for key in linear_keys(component, lm_head=False)
    }


def hold(folder: Path, weights: Mapping[str, Weight], *dtypes: str) -> None:
    store_quantized(folder / QUANTIZED_NAME, weights, block_size=32, dtypes=dtypes or ("F32",))


def use(reference: Reference, folder: Path, how: QuantizationSpec | None = None):
    return use_quantized_weights(reference, folder, how or spec(), progress=SilentProgress())


def test_decoder_computes_with_what_the_bundle_holds(reference, tmp_path):
    hold(tmp_path, weights_of(reference))
    layer = reference.decoder.get_submodule("layers.0.self_attn.q_proj")
    before = layer.weight.clone()
    (row,) = use(reference, tmp_path)
    assert row.passed
    assert (row.component, row.tensor, row.calls) == (DECODER, ROUNDED, 14)
    assert torch.equal(layer.weight, dequantize(tmp_path / QUANTIZED_NAME, FIRST))
    assert not torch.equal(layer.weight, before)


def test_scales_of_every_dtype_are_compared(reference, tmp_path):
    hold(tmp_path, weights_of(reference), "F32", "F16")
    edit(tmp_path, f"{SECOND}.scales.float16", lambda raw: b"\0\x7e" + raw[2:])
    (row,) = use(reference, tmp_path)
    assert "0 of 1024 values and 1 of 64 scales differ" in row.reason
    assert not row.passed


def test_a_weight_that_is_not_there_is_refused(reference, tmp_path):
    weights = weights_of(reference)
    del weights[SECOND]
    hold(tmp_path, weights)
    with pytest.raises(BundleError, match=rf"does not hold {SECOND}.*nothing of that name"):
        use(reference, tmp_path)


def test_blocks_of_another_size_than_the_manifest_s_are_refused(reference, tmp_path):
    hold(tmp_path, weights_of(reference))
    with pytest.raises(BundleError, match=r"scales.*\[1, 32\].*allowed: 512 bytes.*\[0, 32\]"):
        use(reference, tmp_path, spec(block_size=64))


def halfway(shift: float) -> torch.Tensor:
    """[32, 32] of 7s, where scales are 1, and of values that are ``shift`` from halfway."""
    values = torch.full((32, 32), 7.0)
    values[:, 1:] = 2.5 + shift
    return values


def computed(values: torch.Tensor) -> DerivedWeight:
    return DerivedWeight(
        dtype="F32", shape=(32, 32), sources=(), compute=lambda: values, origin="computed"
    )


ULP = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("one", "other", "passes"),
    [(-2 * ULP, 2 * ULP, True), (-0.01, 2 * ULP, False), (-2 * ULP, 1.0, False)],
)
def test_a_computed_weight_may_round_to_either_side_only_where_it_lies_halfway(
    reference, tmp_path, one, other, passes
):
    """``other`` is in the bundle, and ``one`` is what comes out here."""
    hold(tmp_path, {**weights_of(reference), FIRST: computed(halfway(other))})
    (row,) = use(with_first(reference, computed(halfway(one))), tmp_path)
    assert row.passed is passes
    assert row.max_abs_diff >= 1


def test_a_computed_weight_s_scale_may_be_the_next_one_and_no_other(reference, tmp_path):
    values = halfway(-0.5)
    for factor, passes in (
        (1 + COMPUTED_WEIGHT.scales, True),
        (1 + 4 * COMPUTED_WEIGHT.scales, False),
    ):
        folder = tmp_path / str(factor)
        folder.mkdir()
        hold(folder, {**weights_of(reference), FIRST: computed(values * factor)})
        (row,) = use(with_first(reference, computed(values)), folder)
        assert row.passed is passes, row.reason


def with_first(reference: Reference, weight: Weight) -> Reference:
    component = reference.component(DECODER)
    refs = {**component.weight_refs, FIRST.removeprefix(f"{DECODER}."): weight}
    new = replace(component, weight_refs=refs)
    components = tuple(new if c.name == DECODER else c for c in reference.components)
    return replace(reference, components=components)
