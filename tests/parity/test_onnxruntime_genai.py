"""A decoder that holds its position ids, in a runtime that feeds 0, 1, 2, ... and nothing else.

onnxruntime-genai counts ``position_ids`` by itself and knows no ``kept_positions``. The prompt's
embeddings are fed as rows of a larger table of words; what it generates is embedded by the model's
own. Without ``onnxruntime-genai``, which this project does not depend on, the test is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gap_export.bundle import open_bundle
from gap_export.evaluation.refshapes import iter_samples
from gap_export.parity.replay import RecordingBackend
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.session import GroundingSession

NUM_EXPRESSIONS = 50
DECODER = "decoder_model_merged"


def with_own_words(decoder: Path, words: np.ndarray) -> onnx.ModelProto:
    """The decoder behind ``Gather(Concat(words, prompt_embeds), input_ids)``.

    Args:
        decoder: Its file.
        words: float32 [V, H].
    """
    model = onnx.load(decoder)
    graph = model.graph
    (embeds,) = (value for value in graph.input if value.name == "inputs_embeds")
    graph.input.remove(embeds)
    width = words.shape[1]
    graph.input.extend(
        [
            helper.make_tensor_value_info(
                "input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]
            ),
            helper.make_tensor_value_info("prompt_embeds", TensorProto.FLOAT, ["rows", width]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(words, "words"))
    graph.node.insert(0, helper.make_node("Concat", ["words", "prompt_embeds"], ["rows"], axis=0))
    graph.node.insert(1, helper.make_node("Gather", ["rows", "input_ids"], ["inputs_embeds"]))
    return model


def write_model(bundle: Path, folder: Path, words: np.ndarray) -> None:
    """What onnxruntime-genai opens."""
    manifest = open_bundle(bundle).manifest
    spec = manifest.decoder
    folder.mkdir()
    onnx.save(with_own_words(bundle / f"{DECODER}.onnx", words), folder / "model.onnx")
    tensors = {"past": "past_key_values.%d", "present": "present.%d"}
    config = {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": list(spec.eos_token_ids),
            "pad_token_id": 0,
            "context_length": spec.max_position_embeddings,
            "vocab_size": spec.vocab_size,
            "decoder": {
                "filename": "model.onnx",
                "head_size": spec.head_dim,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.num_key_value_heads,
                "num_key_value_heads": spec.num_key_value_heads,
                "num_hidden_layers": spec.num_layers,
                "inputs": {
                    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                    "past_key_names": f"{tensors['past']}.key",
                    "past_value_names": f"{tensors['past']}.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{tensors['present']}.key",
                    "present_value_names": f"{tensors['present']}.value",
                },
            },
        },
        "search": {"do_sample": False, "past_present_share_buffer": False},
    }
    (folder / "genai_config.json").write_text(json.dumps(config))


@pytest.mark.full
def test_a_baked_decoder_gives_the_same_tokens_as_our_session(exports, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    options = {"model": "refshapes-llava", "pruner": "spatial", "keep_ratio": 0.3}
    bundle = exports.bundle(**options, bake_positions=True)
    opened = open_bundle(bundle)
    spec = opened.manifest.decoder
    recorder = RecordingBackend(OnnxRuntimeBackend(opened))
    every = np.arange(spec.vocab_size)[None]
    words = recorder.run("embed_tokens", {"input_ids": every})["inputs_embeds"][0]
    write_model(bundle, tmp_path / "genai", words)
    model = genai.Model(str(tmp_path / "genai"))
    differing = []
    with GroundingSession(opened.manifest, bundle, recorder) as session:
        for sample in iter_samples(seed=0, num_samples=NUM_EXPRESSIONS):
            recorder.calls = []
            expected = session.ground(sample.image, sample.expression.text).token_ids
            prefill = next(call for call in recorder.calls if call.is_decode)
            embeds = prefill.inputs["inputs_embeds"][0]
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=len(embeds) + len(expected))
            generator = genai.Generator(model, parameters)
            generator.set_model_input("prompt_embeds", embeds)
            generator.append_tokens(np.arange(len(embeds), dtype=np.int32) + spec.vocab_size)
            found = []
            while not generator.is_done():
                generator.generate_next_token()
                found.append(int(generator.get_next_tokens()[0]))
            if tuple(found) != tuple(expected):
                differing.append((sample.expression.text, expected, found))
    assert not differing
