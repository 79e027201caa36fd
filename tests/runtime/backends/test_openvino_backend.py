"""Real graphs in OpenVINO: equal to ONNX Runtime, caches side by side, the oracle, refusals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import MissingDependencyError, UsageError
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.backends.openvino_backend import OpenVinoBackend
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.positions import VisualSpan, build_kept_positions
from gap_export.spec.requests import OpenVinoOptions
from gap_export.spec.tolerances import tolerances_of, with_int8_tower
from tests.families.masked_oracle import backend_decoder, check_masked_oracle
from tests.runtime.backends.test_onnxruntime_backend import EXPRESSIONS, random_prompt

openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")


@pytest.fixture(scope="module")
def backend(tiny_bundle: Path) -> Iterator[OpenVinoBackend]:
    with OpenVinoBackend(open_bundle(tiny_bundle), num_threads=1) as opened:
        yield opened


INT4 = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
KINDS = {
    "float32": {"keep_ratio": 0.3},
    "text encoder": {"pruner": "text", "keep_ratio": 0.3},
    "adaptive": {"pruner": "trim"},
    "float16": {"pruner": "spatial", "keep_ratio": 0.3, "dtype": "float16"},
    "int4": {"keep_ratio": 0.3, "quantization": INT4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_onnx_runtime(tiny_checkpoint, exports, image, kind):
    bundle = exports.bundle(model=str(tiny_checkpoint), **KINDS[kind])
    answers = []
    for backend in ("onnxruntime", "openvino"):
        with GroundingSession.open(bundle, backend=backend, num_threads=1) as session:
            answers.append(session.ground_batch(image, EXPRESSIONS))
    for one, other in zip(*answers, strict=True):
        assert one.token_ids == other.token_ids
        assert one.keep_indices == other.keep_indices
        assert one.box == other.box
    assert answers[1][0].backend.startswith("OpenVINO 2026.")


def test_cache_grown_step_by_step_equals_onnx_runtime_at_once(backend, tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    given = random_prompt(bundle.manifest, 9, rows=2)
    # Padding on the left, and a slot in the middle that no later token may see.
    given["attention_mask"][0, :2] = given["attention_mask"][1, 4] = 0
    with OnnxRuntimeBackend(bundle, num_threads=1) as truth:
        at_once = truth.decode(given, truth.new_cache(2, 9))
    caches = [backend.new_cache(2, 9) for _ in range(2)]
    for start, end in ((0, 6), (6, 7), (7, 9)):
        step = {
            "inputs_embeds": given["inputs_embeds"][:, start:end],
            "attention_mask": given["attention_mask"][:, :end],
            "position_ids": given["position_ids"][:, start:end],
            "kept_positions": given["kept_positions"],
        }
        # Two caches that grow in turns.
        logits = [backend.decode(step, cache) for cache in caches]
    for each in logits:
        np.testing.assert_allclose(each, at_once, atol=1e-4)
    compact = given | {"kept_positions": np.arange(6, dtype=np.int64)[None].repeat(2, axis=0)}
    assert np.abs(backend.decode(compact, backend.new_cache(2, 9)) - at_once).max() > 1e-2


@pytest.mark.parametrize("num_rows", [1, 3])
def test_forked_caches_go_on_from_one_row_that_stays_as_it_is(backend, tiny_bundle, num_rows):
    given = random_prompt(open_bundle(tiny_bundle).manifest, 9, rows=num_rows)
    given["inputs_embeds"][:, :5] = given["inputs_embeds"][:1, :5]
    at_once = backend.decode(given, backend.new_cache(num_rows, 9))
    first = {name: values[:1] for name, values in given.items()}
    first["inputs_embeds"] = given["inputs_embeds"][:1, :5]
    first["attention_mask"], first["position_ids"] = np.ones((1, 5), np.int64), np.arange(5)[None]
    cache = backend.new_cache(1, 5)
    backend.decode(first, cache)
    rest = {**given, **{name: given[name][:, 5:] for name in ("inputs_embeds", "position_ids")}}
    for _ in range(2):
        fork = backend.fork_cache(cache, num_rows, 9)
        np.testing.assert_allclose(backend.decode(rest, fork), at_once, atol=1e-4)
        assert (fork.batch_size, fork.length, cache.length) == (num_rows, 9, 5)


def test_attention_of_float32_is_one_operator_whose_cache_grows_in_place(backend):
    graph = backend._graphs["decoder_model_merged"].compiled.get_runtime_model()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in graph.get_ops()]
    layers = backend._manifest.decoder.num_layers
    assert (kinds.count("ScaledDotProductAttention"), kinds.count("Softmax")) == (layers, 0)


def test_oracle_holds_in_openvino(backend, tiny_bundle, tiny_graphs):
    reference = tiny_graphs.reference()
    hidden = open_bundle(tiny_bundle).manifest.decoder.hidden_size
    full = np.random.default_rng(3).normal(size=(1, 25, hidden)).astype(np.float32)
    span = VisualSpan(start=5, num_visual_tokens=16, keep_indices=np.array([0, 3, 4, 9, 14]))
    table = build_kept_positions(unpruned_length=25, spans=[span])
    check_masked_oracle(reference, backend_decoder(backend), full, table, steps=12)


def test_bfloat16_is_no_more_off_than_its_tolerance_and_more_than_that_of_float32(
    backend, tiny_bundle
):
    bundle = open_bundle(tiny_bundle)
    given = random_prompt(bundle.manifest, 9)
    options = OpenVinoOptions(inference_precision="bfloat16")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UsageError, match="no arithmetic of bfloat16"):
            OpenVinoBackend(bundle, options)
        pytest.skip("this CPU has no arithmetic of bfloat16")
    with OpenVinoBackend(bundle, options, num_threads=1) as rounded:
        logits = rounded.decode(given, rounded.new_cache(1, 9))
        name, precision = rounded.name, rounded.inference_precision
    truth = backend.decode(given, backend.new_cache(1, 9))
    off = float(np.abs(logits - truth).max())
    exact = tolerances_of("float32")["logits"].absolute(float(np.abs(truth).max()))
    rule = tolerances_of("float32", inference_precision=precision)["logits"]
    assert exact < off <= rule.absolute(float(np.abs(truth).max()))
    assert name.endswith("(CPU, bfloat16)")


def test_threads_share_a_session(tiny_bundle, image):
    with (
        GroundingSession.open(tiny_bundle, backend="openvino", num_threads=1) as session,
        ThreadPoolExecutor(3) as pool,
    ):
        alone = [session.ground(image, expression).token_ids for expression in EXPRESSIONS]
        together = pool.map(lambda text: session.ground(image, text).token_ids, EXPRESSIONS)
        assert list(together) == alone


def test_device_that_is_not_there_is_refused(tiny_bundle):
    with pytest.raises(UsageError, match=r"no such device here: TPU; allowed: .*CPU"):
        GroundingSession.open(
            tiny_bundle, backend="openvino", openvino=OpenVinoOptions(device="TPU")
        )


def test_options_of_another_backend_are_refused(tiny_bundle):
    for wrong in ({"execution_providers": ["CPUExecutionProvider"]}, {"engines": "orin"}):
        with pytest.raises(UsageError, match="cannot be used with openvino"):
            GroundingSession.open(tiny_bundle, backend="openvino", **wrong)
    with pytest.raises(UsageError, match="options of OpenVINO cannot be used with onnxruntime"):
        GroundingSession.open(tiny_bundle, openvino=OpenVinoOptions(device="GPU"))


def test_missing_package_says_what_to_install(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"not installed: openvino; .*\[openvino\]"):
        GroundingSession.open(tiny_bundle, backend="openvino")


def test_int8_tower_keeps_its_weights_as_integers(tiny_checkpoint, exports):
    bundle = open_bundle(
        exports.bundle(
            model=str(tiny_checkpoint), pruner="fastervlm", keep_ratio=0.3, vision_dtype="int8"
        )
    )
    shape = (1, *bundle.manifest.graph("vision_encoder").inputs[0].shape[1:])
    pixels = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    with OnnxRuntimeBackend(bundle, num_threads=1) as truth:
        wanted = truth.run("vision_encoder", {"pixel_values": pixels})
    with OpenVinoBackend(bundle, num_threads=1) as rounded:
        found = rounded.run("vision_encoder", {"pixel_values": pixels})
        graph = rounded._graphs["vision_encoder"].compiled.get_runtime_model()
    kinds = [node.get_rt_info() for node in graph.get_ops()]
    layers = [kind for kind in kinds if kind["layerType"].astype(str) == "FullyConnected"]
    assert "i8" in {layer["runtimePrecision"].astype(str) for layer in layers}
    rule = with_int8_tower(tolerances_of("float32"))["token_scores"]
    off = np.abs(found["token_scores"] - wanted["token_scores"]).max()
    assert 0 < off <= rule.absolute(float(np.abs(wanted["token_scores"]).max()))
