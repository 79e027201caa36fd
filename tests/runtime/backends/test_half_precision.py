"""float16 graphs on the CPU: what is fed, what comes out, and that weights are not held twice."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from gap_export.bundle import Bundle, open_bundle
from gap_export.errors import BundleError, UsageError
from gap_export.runtime.backends.onnxruntime_backend import SLOW_ON_A_CPU, OnnxRuntimeBackend
from gap_export.spec.manifest import QuantizationSpec, TensorPlace
from tests.parity.mutants import rewrite, rewrite_graph
from tests.programs import run_program
from tests.shared import SharedExports

CPU = ["CPUExecutionProvider"]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, exports: SharedExports) -> Bundle:
    model = str(tiny_checkpoint)
    return open_bundle(
        exports.bundle(model=model, pruner="spatial", keep_ratio=0.3, dtype="float16")
    )


def with_newline(bundle: Bundle, place: TensorPlace) -> Bundle:
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, newline=place))


def test_floats_are_fed_and_come_out_as_the_graphs_declare(bundle):
    with OnnxRuntimeBackend(bundle, CPU, form="base") as backend:
        seen = backend.run("vision_encoder", {"pixel_values": np.ones((2, 3, 32, 32), np.float32)})
        assert (seen["image_features"].dtype, len(seen["keep_indices"])) == (np.float16, 2)
        ids = np.asarray([[1, 2, 3]])
        embeds = backend.run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
        assert embeds.dtype == np.float16
        cache = backend.new_cache(1, 3)
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, 3), np.int64),
            "position_ids": np.arange(3)[None],
            "kept_positions": np.arange(3)[None],
        }
        logits = backend.decode(feed, cache)
        assert (logits.dtype, logits.shape) == (np.float16, (1, bundle.manifest.decoder.vocab_size))
        kinds = {value.data_type() for value in cache.values.values()}
        assert kinds == {"tensor(float16)"}
        # A caller with float32 embeddings, as bfloat16 ones are here, is served as well.
        feed["inputs_embeds"] = embeds.astype(np.float32)
        assert (backend.decode(feed, backend.new_cache(1, 3)) == logits).all()


def test_newline_is_read_in_the_graphs_dtype(bundle, tmp_path):
    with (
        OnnxRuntimeBackend(bundle, CPU) as plain,
        pytest.raises(UsageError, match="no such component: newline"),
    ):
        plain.run("newline", {})
    copied = open_bundle(rewrite(bundle.path, tmp_path / "own"))
    hidden = bundle.manifest.decoder.hidden_size
    place = TensorPlace(file="newline.bin", offset=4, dtype="float32", shape=(hidden,))
    values = np.arange(hidden, dtype=np.float32) / 3
    (copied.path / place.file).write_bytes(b"head" + values.tobytes())
    with OnnxRuntimeBackend(with_newline(copied, place), CPU) as backend:
        newline = backend.run("newline", {})["image_newline"]
    assert newline.dtype == np.float16
    assert newline.tolist() == values.astype(np.float16).tolist()


def test_newline_outside_of_its_file_is_refused(bundle):
    place = TensorPlace(file="tokenizer.json", offset=10**9, dtype="float32", shape=(8,))
    with pytest.raises(BundleError, match="lies outside of its file"):
        OnnxRuntimeBackend(with_newline(bundle, place), CPU)


def test_input_of_another_dtype_is_refused(tiny_bundle, tmp_path):
    def narrow(model: onnx.ModelProto) -> None:
        (slots,) = (value for value in model.graph.input if value.name == "position_ids")
        slots.type.tensor_type.elem_type = TensorProto.INT32
        for node in model.graph.node:
            node.input[:] = ["wide" if name == slots.name else name for name in node.input]
        cast = helper.make_node("Cast", [slots.name], ["wide"], to=TensorProto.INT64)
        model.graph.node.insert(0, cast)

    spoilt = rewrite_graph(tiny_bundle, tmp_path / "narrow", "decoder_model_merged", narrow)
    with pytest.raises(BundleError, match=r"dtype that is not fed: position_ids: tensor\(int32\)"):
        OnnxRuntimeBackend(open_bundle(spoilt), CPU, form="base")


def test_memory_is_spared_on_the_cpu_without_being_asked(bundle, started):
    OnnxRuntimeBackend(bundle, CPU)
    levels = {options.graph_optimization_level for _, options in started}
    orders = {options.execution_order for _, options in started}
    assert levels == {ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED}
    assert orders == {ort.ExecutionOrder.PRIORITY_BASED}


NUM_LAYERS, WIDTH = 24, 1024
MEASURE = """
import sys
import numpy as np
import onnxruntime as ort
from gap_export.runtime.backends.onnxruntime_options import session_options, spare_memory

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024

options = session_options(1)
if sys.argv[2] == "spare":
    spare_memory(options)
start = anonymous()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = np.ones((1, int(sys.argv[3])), np.float16)
y = session.run(None, {"x": x})[0]
print(anonymous() - start, float(y.astype(np.float64).sum()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_half_precision_weights_stay_in_their_file(tmp_path):
    layer = (np.random.default_rng(0).normal(size=(WIDTH, WIDTH)) * 0.03).astype(np.float16)
    nodes, weights, name = [], [], "x"
    with (tmp_path / "weights.bin").open("wb") as file:
        for number in range(NUM_LAYERS):
            # Equal weights would be held once, whatever is done with them.
            layer[0, 0] = number / 100
            tensor = TensorProto(
                name=f"w{number}",
                data_type=TensorProto.FLOAT16,
                dims=layer.shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in (
                ("location", "weights.bin"),
                ("offset", file.tell()),
                ("length", layer.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            file.write(layer.tobytes())
            weights.append(tensor)
            output = "y" if number + 1 == NUM_LAYERS else f"x{number}"
            nodes.append(helper.make_node("MatMul", [name, f"w{number}"], [output]))
            name = output
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["B", WIDTH]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "chain.onnx")

    def run(how: str) -> tuple[int, float]:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "chain.onnx"), how, str(WIDTH)]
        done = run_program(command)
        assert done.returncode == 0, done.stderr
        megabytes, total = done.stdout.split()
        return int(megabytes), float(total)

    (plain, expected), (spare, found) = run("plain"), run("spare")
    in_file = NUM_LAYERS * layer.nbytes // 2**20
    # The fact that the options are for: by default, weights twice as large as in the file.
    assert plain > 1.5 * in_file
    assert spare < 0.7 * in_file
    assert found == pytest.approx(expected, rel=1e-2)


def test_a_float16_decoder_says_that_it_is_slow_on_a_cpu(bundle, caplog):
    OnnxRuntimeBackend(bundle, CPU)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == SLOW_ON_A_CPU


def test_float_weights_of_an_int4_decoder_are_cast_when_it_is_opened(
    tiny_checkpoint, exports, started, caplog
):
    spec = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
    made = exports.bundle(
        model=str(tiny_checkpoint),
        pruner="spatial",
        keep_ratio=0.3,
        dtype="float16",
        quantization=spec,
    )
    OnnxRuntimeBackend(open_bundle(made), CPU)
    levels = [options.graph_optimization_level for _, options in started]
    # The decoder alone; nothing else of it is quantized.
    assert levels.count(ort.GraphOptimizationLevel.ORT_ENABLE_ALL) == 1
    assert not caplog.records
