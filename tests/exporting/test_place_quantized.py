"""A bundle of INT4 weights: what is in it, for graphs of several dtypes, and what they compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gap_export.bundle import write_bundle
from gap_export.checkpoint.weights import TORCH_DTYPES, quantize_columns
from gap_export.errors import UsageError
from gap_export.exporting.place_weights import (
    NOT_HELD,
    PlacedWeights,
    check_quantization,
    place_weights,
    quantize_weights,
)
from gap_export.exporting.quantization import linear_keys
from gap_export.exporting.trace import save_graph, trace_component
from gap_export.families import Reference
from gap_export.graph.passes.quantize_linear import QuantizeLinear
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.progress import SilentProgress
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.tolerances import TOLERANCES
from tests.exporting.references import reference_of

DECODER = "decoder_model_merged"


def spec(block_size: int = 32, *, lm_head: bool = False) -> QuantizationSpec:
    return QuantizationSpec(dtype="int4", block_size=block_size, method="rtn", lm_head=lm_head)


def place(
    folder: Path,
    out: Path,
    dtypes: Sequence[str] = ("float32",),
    *,
    how: QuantizationSpec | None = None,
    pruner: str = "spatial",
    floats_first: bool = False,
) -> tuple[list[Reference], list[PlacedWeights], Path]:
    """References of some dtypes, where their weights are, and a copy of what the bundle held.

    ``floats_first``: the first of them is not quantized.
    """
    references = [reference_of(folder, dtype, pruner) for dtype in dtypes]
    how = how or spec()
    kept = out.parent / "kept"
    silent = SilentProgress()
    with write_bundle(out) as draft:
        places = quantize_weights(draft, references[0], how, dtypes=dtypes, progress=silent)
        placed: list[PlacedWeights] = []
        for reference in references:
            placed.append(
                place_weights(
                    draft,
                    reference,
                    hold="link",
                    progress=silent,
                    quantized={} if floats_first and not placed else places,
                    beside=placed[-1] if placed else None,
                )
            )
        shutil.copytree(draft.folder, kept)
    return references, placed, kept


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read(folder: Path, held) -> torch.Tensor:
    raw = (folder / held.location).read_bytes()[held.offset : held.offset + held.length]
    return torch.frombuffer(bytearray(raw), dtype=TORCH_DTYPES[held.dtype]).reshape(held.shape)


def assert_floats_are_there(reference: Reference, placed: PlacedWeights, folder: Path) -> None:
    """All but the quantized ones, with the checkpoint's values in the reference's dtype."""
    for component in reference.components:
        instead = placed.quantized(component.name)
        for key, held in placed.of(component.weight_refs).items():
            if key in instead:
                assert held.location == NOT_HELD, key
                continue
            weight = component.weight_refs[key]
            assert torch.equal(read(folder, held), weight.load().to(TORCH_DTYPES[held.dtype])), key


def test_only_int4_of_a_quantized_layer_gets_into_the_bundle(tiny_checkpoint, tmp_path):
    (reference,), (placed,), kept = place(tiny_checkpoint, tmp_path / "b")
    # The checkpoint's own file holds the floats, so it stays out although its dtype serves.
    assert names_in(kept) == {"int4.safetensors", "converted.safetensors"}
    assert_floats_are_there(reference, placed, kept)
    quantized = placed.quantized(DECODER)
    assert set(quantized) == set(linear_keys(reference.component(DECODER), lm_head=False))
    assert len(quantized) == 14
    converted = load_file(kept / "converted.safetensors")
    assert not [name for name in converted if name.endswith("_proj.weight") and DECODER in name]
    assert f"{DECODER}.lm_head.weight" in converted


def test_two_dtypes_share_the_integers_and_have_floats_of_their_own(tiny_checkpoint, tmp_path):
    dtypes = ("float32", "float16", "bfloat16")
    references, placed, kept = place(tiny_checkpoint, tmp_path / "b", dtypes)
    assert names_in(kept) == {
        "int4.safetensors",
        "converted.safetensors",
        "converted-float16.safetensors",
        "converted-bfloat16.safetensors",
    }
    for reference, where in zip(references, placed, strict=True):
        assert_floats_are_there(reference, where, kept)
        assert where.quantized(DECODER) == placed[0].quantized(DECODER)
    (first, *_) = placed[0].quantized(DECODER).values()
    scales = {dtype: read(kept, held).float() for dtype, held in first.scales.items()}
    assert set(scales) == {"F32", "F16", "BF16"}
    assert torch.equal(scales["F32"], scales["F16"])
    assert torch.equal(scales["F32"], scales["BF16"])


def test_integers_are_those_of_the_checkpoints_own_values(tiny_checkpoint, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _, _, kept = place(tiny_checkpoint, tmp_path / "one" / "b", ("float32",))
    _, _, other = place(tiny_checkpoint, tmp_path / "two" / "b", ("float16",))
    mine, theirs = (load_file(folder / "int4.safetensors") for folder in (kept, other))
    packed = [name for name in mine if name.endswith(".int4")]
    assert packed
    assert all(torch.equal(mine[name], theirs[name]) for name in packed)


def test_file_that_holds_nothing_quantized_is_still_linked(tiny_checkpoint, tmp_path):
    (reference,), (placed,), kept = place(tiny_checkpoint, tmp_path / "b", pruner="text")
    assert names_in(kept) == {
        "int4.safetensors",
        "converted.safetensors",
        "visual_projection.safetensors",
        "model.safetensors",
    }
    text_tower = (tiny_checkpoint / "clip" / "model.safetensors").read_bytes()
    assert (kept / "model.safetensors").read_bytes() == text_tower
    assert_floats_are_there(reference, placed, kept)


def test_floats_that_are_there_for_another_graph_are_used(tiny_checkpoint, tmp_path):
    """Base graphs as they are, quantized ones of the same dtype beside them: nothing twice."""
    references, placed, kept = place(
        tiny_checkpoint, tmp_path / "b", ("float32", "float32"), floats_first=True
    )
    assert names_in(kept) == {"int4.safetensors", "model.safetensors"}
    assert placed[0].quantized(DECODER) == {}
    for reference, where in zip(references, placed, strict=True):
        assert_floats_are_there(reference, where, kept)


def test_lm_head_is_quantized_where_asked_and_a_shared_embedding_stays(make_checkpoint, tmp_path):
    folder = make_checkpoint(tie_word_embeddings=True)
    (reference,), (placed,), kept = place(folder, tmp_path / "b", how=spec(lm_head=True))
    assert "lm_head.weight" in placed.quantized(DECODER)
    embedding = reference.component("embed_tokens").weight_refs
    assert placed.of(embedding)["weight"].location == "converted.safetensors"
    assert list(load_file(kept / "converted.safetensors")).count("embed_tokens.weight") == 1


def test_checkpoint_file_called_like_ours_gets_another_name(tiny_checkpoint, tmp_path):
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    clip = folder / "clip"
    (clip / "model.safetensors").rename(clip / "int4.safetensors")
    names = dict.fromkeys(load_file(clip / "int4.safetensors"), "int4.safetensors")
    index = clip / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    (reference,), (placed,), kept = place(folder, tmp_path / "b", pruner="text")
    assert "clip-int4.safetensors" in names_in(kept)
    assert_floats_are_there(reference, placed, kept)


def test_block_that_does_not_fit_is_refused_and_nothing_is_left(tiny_checkpoint, tmp_path):
    said = rf"{DECODER}\.layers\.0\..*: width 32; allowed: 32 for this layer; use a block of 32"
    with pytest.raises(UsageError, match=said):
        check_quantization(reference_of(tiny_checkpoint), spec(64))
    with pytest.raises(UsageError, match=said):
        place(tiny_checkpoint, tmp_path / "out" / "b", how=spec(64))
    assert not (tmp_path / "out").exists()


def quantized_graph(folder: Path, reference: Reference, placed: PlacedWeights) -> Path:
    component = reference.component(DECODER)
    model = trace_component(component, placed=placed.of(component.weight_refs))
    run_pipeline(model, (*PIPELINES[DECODER], QuantizeLinear(placed.quantized(DECODER))))
    path = folder / f"decoder_{reference.dtype}.onnx"
    save_graph(model, path)
    return path


def rounded(reference: Reference) -> torch.nn.Module:
    """The decoder on the CPU, its linear layers rounded."""
    module = reference.component(DECODER).module
    for key in linear_keys(reference.component(DECODER), lm_head=False):
        layer = module.get_submodule(key.removesuffix(".weight"))
        steps, scales = quantize_columns(layer.weight, block_size=32)
        layer.weight.data = (steps * scales).reshape(layer.weight.shape)
    return module


@pytest.fixture(scope="module")
def quantized_bundle(tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Decoders in float32 and float16 on one set of integers, by dtype."""
    folder = tmp_path_factory.mktemp("quantized")
    references, placed, kept = place(tiny_checkpoint, folder / "b", ("float32", "float16"))
    return {
        reference.dtype: quantized_graph(kept, reference, where)
        for reference, where in zip(references, placed, strict=True)
    }


def feeds(dtype: str, heads: int, width: int, layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    slots = np.arange(9)[None]
    fed = {
        "inputs_embeds": rng.standard_normal((1, 9, 32)).astype(dtype),
        "attention_mask": np.ones((1, 9), np.int64),
        "position_ids": slots,
        "kept_positions": np.array([[0, 1, 2, 5, 7, 8, 12, 13, 14]]),
    }
    for index in range(layers):
        for part in ("key", "value"):
            fed[f"past_key_values.{index}.{part}"] = np.zeros((1, heads, 0, width), dtype)
    return fed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_quantized_decoder_equals_pytorch_with_the_rounded_weights(
    tiny_checkpoint, quantized_bundle, dtype
):
    import onnxruntime

    reference = reference_of(tiny_checkpoint, device="cpu")
    shape = reference.decoder_spec
    fed = feeds(dtype, shape.num_key_value_heads, shape.head_dim, shape.num_layers)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Float activations: what ONNX Runtime does by default, rounding them to int8, costs 0.5 %.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(
        quantized_bundle[dtype], options, providers=["CPUExecutionProvider"]
    )
    logits = session.run(["logits"], fed)[0].astype(np.float64)
    given = {name: torch.from_numpy(array) for name, array in fed.items()}
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    ids = given.pop("kept_positions")
    given["position_ids"] = ids
    with torch.inference_mode():
        wanted = rounded(reference)(*given.values())[0].double().numpy()
        exact = reference_of(tiny_checkpoint, device="cpu").decoder
        plain = exact(*given.values())[0].double().numpy()
    tolerance = TOLERANCES[dtype]["logits"]
    bound = (
        tolerance.atol
        + tolerance.largest_fraction * np.abs(wanted).max()
        + tolerance.rtol * np.abs(wanted)
    )
    assert (np.abs(logits - wanted) <= bound).all()
    # The bar can tell: weights that were not rounded give other logits.
    assert (np.abs(plain - wanted) > bound).any()


def test_tensorrt_keeps_int4_in_the_plan(tmp_path):
    """One linear layer, 1024 wide: 2.1 MB in float16, 0.56 MB as INT4 with its scales."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    import onnx_ir as ir

    from gap_export.checkpoint.weights import random_normal, store_quantized, store_weights
    from tests.engines.sm89 import build_plan

    weight = random_normal((1024, 1024), std=0.02, seed=0, dtype="F16")
    store_weights(tmp_path / "w.safetensors", {"w": weight}, dtype="F16")
    held = store_quantized(
        tmp_path / "int4.safetensors", {"w": weight}, block_size=64, dtypes=["F16"]
    )
    sizes = {}
    for name, passes in (("float", ()), ("int4", (QuantizeLinear(held),))):
        model = one_layer(weight.load())
        run_pipeline(model, passes)
        ir.save(model, tmp_path / f"{name}.onnx")
        sizes[name] = len(build_plan(tmp_path / f"{name}.onnx", {"rows": (1, 16, 64)}))
    assert sizes["float"] > 2 * 1024 * 1024
    assert sizes["int4"] < 0.65 * 1024 * 1024


def one_layer(weight: torch.Tensor):
    import onnx_ir as ir

    kind = ir.TensorType(ir.DataType.FLOAT16)
    rows, width = weight.shape
    x = ir.Value(name="x", type=kind, shape=ir.Shape(["rows", width]))
    w = ir.Value(name="w", type=kind, shape=ir.Shape([rows, width]))
    w.const_value = ir.tensor(weight.numpy(), name="w")
    gemm = ir.node("Gemm", [x, w], attributes={"transB": 1}, name="gemm")
    y = gemm.outputs[0]
    y.name, y.type, y.shape = "y", kind, ir.Shape(["rows", rows])
    graph = ir.Graph([x], [y], nodes=[gemm], initializers=[w], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)
