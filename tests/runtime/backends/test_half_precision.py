"""float16 graphs on the CPU: what is fed, what comes out, and that weights are not held twice."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from gap_export.bundle import open_bundle, write_bundle
from gap_export.errors import BundleError, UsageError
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.spec.manifest import GraphSpec, Manifest, TensorPlace, TensorSpec
from tests.programs import run_program

CPU = ["CPUExecutionProvider"]
HIDDEN, VOCAB, KEPT = 8, 32, 5
ONNX_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
}
MakeBundle = Callable[..., Path]


def describe(specs: tuple[TensorSpec, ...]) -> list[Any]:
    return [helper.make_tensor_value_info(s.name, ONNX_DTYPES[s.dtype], s.shape) for s in specs]


def weight(name: str, *shape: int) -> Any:
    values = np.random.default_rng(len(name)).normal(size=shape) * 0.3
    return numpy_helper.from_array(values.astype(np.float16), name)


def spec_of(component: str, inputs: Any, outputs: Any) -> GraphSpec:
    def tensors(given: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n, dtype=d, shape=s) for n, d, s in given)

    return GraphSpec(
        component=component,
        lowering="onnxruntime",
        dtype="float16",
        kv_contract="concat" if component.startswith("decoder") else "none",
        file=f"{component}.onnx",
        inputs=tensors(inputs),
        outputs=tensors(outputs),
    )


def graphs(position_dtype: str = "int64") -> list[tuple[GraphSpec, list[Any], list[Any]]]:
    """A vision encoder, word embeddings and a decoder of one MatMul each, all float16."""
    vision = spec_of(
        "vision_encoder",
        [("pixel_values", "float32", ("I", 3, 32, 32))],
        [
            ("image_features", "float16", ("I", KEPT, HIDDEN)),
            ("keep_indices", "int64", ("I", KEPT)),
        ],
    )
    vision_nodes = [
        helper.make_node("Cast", ["pixel_values"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("ReduceMean", ["half", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w_vision"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["image_features"]),
        helper.make_node("Shape", ["mean"], ["size"], end=1),
        helper.make_node("Concat", ["size", "one"], ["times"], axis=0),
        helper.make_node("Tile", ["keep", "times"], ["keep_indices"]),
    ]
    vision_weights = [
        weight("w_vision", 3, KEPT * HIDDEN),
        numpy_helper.from_array(np.asarray([2, 3]), "axes"),
        numpy_helper.from_array(np.asarray([-1, KEPT, HIDDEN]), "shape"),
        numpy_helper.from_array(np.asarray([1]), "one"),
        numpy_helper.from_array(np.arange(KEPT)[None] * 3, "keep"),
    ]
    embed = spec_of(
        "embed_tokens",
        [("input_ids", "int64", ("B", "T"))],
        [("inputs_embeds", "float16", ("B", "T", HIDDEN))],
    )
    cache = ("B", 1, "past", HIDDEN)
    decoder = spec_of(
        "decoder_model_merged",
        [
            ("inputs_embeds", "float16", ("B", "S", HIDDEN)),
            ("attention_mask", "int64", ("B", "all")),
            ("position_ids", position_dtype, ("B", "S")),
            ("kept_positions", "int64", ("B", "P")),
            ("past_key_values.0.key", "float16", cache),
            ("past_key_values.0.value", "float16", cache),
        ],
        [
            ("logits", "float16", ("B", "S", VOCAB)),
            ("present.0.key", "float16", ("B", 1, "all", HIDDEN)),
            ("present.0.value", "float16", ("B", 1, "all", HIDDEN)),
        ],
    )
    decoder_nodes = [
        helper.make_node("Unsqueeze", ["inputs_embeds", "one"], ["new"]),
        *(
            helper.make_node(
                "Concat", [f"past_key_values.0.{kind}", "new"], [f"present.0.{kind}"], axis=2
            )
            for kind in ("key", "value")
        ),
        helper.make_node("ReduceSum", ["present.0.key", "two"], ["sum"], keepdims=0),
        helper.make_node("Add", ["inputs_embeds", "sum"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "w_head"], ["logits"]),
        # Inputs that nothing reads would be dropped from the graph.
        *(
            helper.make_node("Identity", [name], [f"{name}_read"])
            for name in ("attention_mask", "position_ids", "kept_positions")
        ),
    ]
    decoder_weights = [
        weight("w_head", HIDDEN, VOCAB),
        numpy_helper.from_array(np.asarray([1]), "one"),
        numpy_helper.from_array(np.asarray([2]), "two"),
    ]
    embed_nodes = [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])]
    return [
        (vision, vision_nodes, vision_weights),
        (embed, embed_nodes, [weight("table", VOCAB, HIDDEN)]),
        (decoder, decoder_nodes, decoder_weights),
    ]


@pytest.fixture
def make_bundle(sample_manifest: Manifest, tokenizer_folder: Path, tmp_path: Path) -> MakeBundle:
    """A bundle of tiny float16 graphs."""

    def make(position_dtype: str = "int64") -> Path:
        specs = []
        decoder = dataclasses.replace(sample_manifest.decoder, vocab_size=VOCAB)
        manifest = dataclasses.replace(sample_manifest, dtype="float16", decoder=decoder)
        with write_bundle(tmp_path / "half") as draft:
            for spec, nodes, weights in graphs(position_dtype):
                graph = helper.make_graph(
                    nodes, "g", describe(spec.inputs), describe(spec.outputs), weights
                )
                model = helper.make_model(
                    graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
                )
                (draft.folder / spec.file).write_bytes(model.SerializeToString())
                specs.append(spec)
            (draft.folder / "tokenizer.json").write_bytes(
                (tokenizer_folder / "tokenizer.json").read_bytes()
            )
            draft.commit(dataclasses.replace(manifest, graphs=tuple(specs)))
        return tmp_path / "half"

    return make


def test_floats_are_fed_and_come_out_as_the_graphs_declare(make_bundle: MakeBundle) -> None:
    with OnnxRuntimeBackend(open_bundle(make_bundle()), CPU) as backend:
        pixels = np.ones((2, 3, 32, 32), np.float32)
        seen = backend.run("vision_encoder", {"pixel_values": pixels})
        features, keep = seen["image_features"], seen["keep_indices"]
        assert (features.dtype, features.shape) == (np.float16, (2, KEPT, HIDDEN))
        assert keep.tolist() == [[0, 3, 6, 9, 12]] * 2
        ids = np.asarray([[1, 2, 3]])
        embeds = backend.run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
        assert embeds.dtype == np.float16
        cache = backend.new_cache(1)
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, 3), np.int64),
            "position_ids": np.arange(3)[None],
            "kept_positions": np.arange(3)[None],
        }
        logits = backend.decode(feed, cache)
        assert (logits.dtype, logits.shape) == (np.float16, (1, VOCAB))
        assert {value.data_type() for value in cache.values.values()} == {"tensor(float16)"}
        # A caller with float32 embeddings, as bfloat16 ones are here, is served as well.
        feed["inputs_embeds"] = embeds.astype(np.float32)
        wide = backend.decode(feed, backend.new_cache(1))
        assert (wide == logits).all()


def test_newline_is_read_in_the_graphs_dtype(make_bundle: MakeBundle) -> None:
    bundle = open_bundle(make_bundle())
    with (
        OnnxRuntimeBackend(bundle, CPU) as plain,
        pytest.raises(UsageError, match="no such component: newline"),
    ):
        plain.run("newline", {})
    place = TensorPlace(file="newline.bin", offset=4, dtype="float32", shape=(HIDDEN,))
    values = np.arange(HIDDEN, dtype=np.float32) / 3
    (bundle.path / place.file).write_bytes(b"head" + values.tobytes())
    manifest = dataclasses.replace(bundle.manifest, newline=place)
    with OnnxRuntimeBackend(dataclasses.replace(bundle, manifest=manifest), CPU) as backend:
        newline = backend.run("newline", {})["image_newline"]
    assert newline.dtype == np.float16
    assert newline.tolist() == values.astype(np.float16).tolist()


def test_newline_outside_of_its_file_is_refused(make_bundle: MakeBundle) -> None:
    bundle = open_bundle(make_bundle())
    place = TensorPlace(file="tokenizer.json", offset=10**9, dtype="float32", shape=(HIDDEN,))
    manifest = dataclasses.replace(bundle.manifest, newline=place)
    with pytest.raises(BundleError, match="lies outside of its file"):
        OnnxRuntimeBackend(dataclasses.replace(bundle, manifest=manifest), CPU)


def test_input_of_another_dtype_is_refused(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(position_dtype="int32")
    with pytest.raises(BundleError, match=r"dtype that is not fed: position_ids: tensor\(int32\)"):
        OnnxRuntimeBackend(open_bundle(bundle), CPU)


def test_memory_is_spared_on_the_cpu_without_being_asked(
    make_bundle: MakeBundle, session_options: list[Any]
) -> None:
    OnnxRuntimeBackend(open_bundle(make_bundle()), CPU)
    levels = {options.graph_optimization_level for options in session_options}
    orders = {options.execution_order for options in session_options}
    assert levels == {ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED}
    assert orders == {ort.ExecutionOrder.PRIORITY_BASED}


@pytest.fixture
def session_options(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Options of every session that is started."""
    seen: list[Any] = []
    real = ort.InferenceSession

    def start(path: str, options: Any, **given: Any) -> Any:
        seen.append(options)
        return real(path, options, **given)

    monkeypatch.setattr(ort, "InferenceSession", start)
    return seen


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
def test_half_precision_weights_stay_in_their_file(tmp_path: Path) -> None:
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
