from __future__ import annotations

import numpy as np

from gap_export.graph.passes.strip_trace_metadata import StripTraceMetadata


def test_metadata_and_doc_strings_are_cleared_everywhere(small_decoder):
    model = small_decoder()
    node = next(iter(model.graph))
    holders = [model, model.graph, node, node.outputs[0], model.graph.inputs[0]]
    for holder in holders:
        holder.metadata_props["stack_trace"] = "File /somewhere/model.py"
        holder.doc_string = "traced"
    assert StripTraceMetadata().run(model)
    assert not any(holder.metadata_props or holder.doc_string for holder in holders)


def test_clean_graph_is_reported_unmodified(small_decoder):
    assert not StripTraceMetadata().run(small_decoder())


def test_numerics_stay(small_decoder, run_model):
    feeds = {"position_ids": np.array([[1, 2]]), "attention_mask": np.array([[1, 0]])}
    before = run_model(small_decoder(), **feeds)
    model = small_decoder()
    model.graph.doc_string = "traced"
    StripTraceMetadata().run(model)
    for old, new in zip(before, run_model(model, **feeds), strict=True):
        assert np.array_equal(old, new)


def test_exported_graph_tells_nothing_about_the_machine(tiny_graphs):
    paths = [tiny_graphs.path(each) for each in ("vision_encoder", "decoder_model_merged")]
    # A loop's body is a graph of its own.
    paths.append(tiny_graphs.path("vision_encoder", "divprune"))
    for path in paths:
        raw = path.read_bytes()
        for word in (b".py", b"/home", b"stack_trace", str(tiny_graphs.checkpoint).encode()):
            assert word not in raw
