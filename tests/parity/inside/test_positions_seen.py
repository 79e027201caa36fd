"""The ids that RoPE sees are read out of a graph, whatever form it has, and held to the maths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gap_export.bundle import open_bundle
from gap_export.errors import BundleError
from gap_export.parity.inside.positions_seen import PositionsNotRead, read_positions
from tests.parity import mutants

DECODER = "decoder_model_merged.onnx"
STEPS = ["prefill", "decode 1", "decode 2", "decode 50"]
HALF = TensorProto.FLOAT16


def read(bundle, **options):
    return read_positions(open_bundle(bundle), **options)


def wrong_calls(rows):
    assert [row.call for row in rows] == STEPS
    assert all(bool(row.reason) is not row.passed for row in rows)
    return [row.call for row in rows if not row.passed]


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_text_bundle"])
def test_an_honest_decoder_sees_what_it_must(fixture, request):
    rows = read(request.getfixturevalue(fixture))
    assert wrong_calls(rows) == []
    # A cosine and a sine, shared by keys and queries; ids up to the last one the model knows.
    assert {row.readers for row in rows} == {2}
    assert rows[0].seen == rows[0].expected == (0, 255)
    assert rows[-1].seen == rows[-1].expected == (255, 255)


DECODE = STEPS[1:]


@pytest.mark.parametrize(
    ("mutant", "calls", "seen"),
    [
        (mutants.gap_node_removed, STEPS, "sees 1 instead of 23"),
        (mutants.compact_positions, STEPS, "sees 1 instead of 23"),
        (mutants.table_off_by_one, STEPS, "sees 1 instead of 0"),
        (mutants.neighbour_in_table, STEPS[:3], "sees 23 instead of 0"),
        (mutants.decode_offset_lost, DECODE, "sees 205 instead of 206"),
    ],
)
def test_wrong_ids_are_found_in_the_calls_they_are_in(tiny_bundle, tmp_path, mutant, calls, seen):
    rows = read(mutant(tiny_bundle, tmp_path / "mutant"))
    assert wrong_calls(rows) == calls
    first = next(row for row in rows if not row.passed)
    assert seen in first.reason
    assert first.seen != first.expected


@pytest.fixture(scope="module")
def long_bundle(tiny_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "bundle"
    return mutants.with_long_context(tiny_bundle, out)


def test_ids_above_2048_that_went_through_float16_are_found(long_bundle, tiny_bundle, tmp_path):
    """Of keys alone: a cosine and a sine more."""
    assert wrong_calls(read(long_bundle)) == []
    rows = read(mutants.keys_with_half_ids(long_bundle, tmp_path / "half"))
    assert {row.readers for row in rows} == {4}
    assert "prefill" in wrong_calls(rows)
    assert "decode 50" in wrong_calls(rows)
    assert rows[-1].expected == (4095, 4095)
    assert rows[-1].seen == (4096, 4096)
    assert "_half" in rows[-1].reason
    # Below, float16 has every whole number.
    assert wrong_calls(read(mutants.keys_with_half_ids(tiny_bundle, tmp_path / "few"))) == []


@pytest.mark.parametrize("last", [255, 4095], ids=["known to float16", "beyond"])
def test_a_compact_bundle_must_see_compact_ids(tiny_bundle, long_bundle, tmp_path, last):
    bundle = tiny_bundle if last == 255 else long_bundle

    def edit(manifest):
        return replace(manifest, pruning=replace(manifest.pruning, positions="compact"))

    rows = read(mutants.rewrite(bundle, tmp_path / "compact", edit_manifest=edit))
    assert wrong_calls(rows) == []
    assert rows[0].expected == (0, last)
    removed = mutants.gap_node_removed(tmp_path / "compact", tmp_path / "removed")
    # As slots are what it sees, there is nothing to be found but where an answer begins late.
    assert "prefill" not in wrong_calls(read(removed))


def test_tables_of_real_prompts_are_read_as_well(tiny_bundle, tmp_path):
    """An answer behind a prompt of one token more than the graph allows for."""

    def edit(model):
        # Ids of slot 30 and beyond are wrong; the prompts that are always tried are shorter.
        add = mutants.function_node(model, "Add")
        values = onnx.numpy_helper.from_array(np.array([29], np.int64), "most")
        function = model.functions[0]
        function.node.append(helper.make_node("Constant", [], ["most"], value=values))
        inner = list(add.output)
        add.output[0] = "unbound"
        function.node.append(helper.make_node("Min", ["unbound", "most"], inner))

    bundle = mutants.rewrite_graph(tiny_bundle, tmp_path / "short", mutants.DECODER, edit)
    assert read(bundle, steps=[0], tables=[np.arange(0, 40, 2)[None]])[0].reason
    honest = read(tiny_bundle, steps=[0], tables=[np.arange(0, 40, 2)[None]])
    assert honest[0].passed


def decoder_of(nodes, *, opset, constants=(), domains=()):
    """Puts other nodes behind the bundle's own GapRemap."""

    def edit(model):
        gap = onnx.NodeProto.FromString(mutants.gap_node(model).SerializeToString())
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend([gap, *nodes])
        for name, values in constants:
            mutants.add_constant(model, name, values)
        for holder in (model, *model.functions):
            for imported in holder.opset_import:
                imported.version = opset if imported.domain == "" else imported.version
        model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in domains)

    return edit


def with_decoder(bundle, out, *args, **kwargs):
    return mutants.rewrite_graph(bundle, out, mutants.DECODER, decoder_of(*args, **kwargs))


def table(ids, width=8, dtype=np.float16):
    """Cosines and sines [R, d / 2] as FuseRotary makes them, of the ids that rows stand for."""
    frequencies = 1e4 ** -(np.arange(0, width, 2) / width)
    turns = np.asarray(ids, np.float32)[:, None] * frequencies[None].astype(np.float32)
    return np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)


ROTARY = {
    "standard": ("", 23, ["query", "cos", "sin", mutants.IDS]),
    "Microsoft's": ("com.microsoft", 20, ["query", mutants.IDS, "cos", "sin"]),
}


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize(
    ("rows", "is_right"),
    [
        (np.arange(4096), True),
        (np.arange(4096).astype(np.float16).astype(np.float32), False),
        (np.arange(4096) + (np.arange(4096) == 4095), False),
    ],
    ids=["whole", "rounded", "last one"],
)
def test_fused_rotation_is_read_with_its_tables(long_bundle, tmp_path, kind, rows, is_right):
    domain, opset, inputs = ROTARY[kind]
    # What is rotated is never run: no such value is there.
    nodes = [
        helper.make_node("Nothing", ["inputs_embeds"], ["query"], "nothing", domain="nobody"),
        helper.make_node("RotaryEmbedding", inputs, ["turned"], "turn", domain=domain),
    ]
    bundle = with_decoder(
        long_bundle,
        tmp_path / "fused",
        nodes,
        opset=opset,
        constants=zip(("cos", "sin"), table(rows), strict=True),
        domains=("nobody", "com.microsoft"),
    )
    found = read(bundle)
    assert {row.readers for row in found} == {1}
    assert (wrong_calls(found) == []) is is_right
    if not is_right:
        assert found[-1].reason.startswith("RotaryEmbedding turn sees 4096 instead of 4095")


def rope(ids, *, factor="Mul"):
    """Cosines by a product of ids [B, S] and frequencies, ids as rows [B, 1, S] of a MatMul."""
    return [
        helper.make_node("Cast", [ids], ["floats"], "floats", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "axis"], ["rows"], "rows"),
        helper.make_node("Shape", [ids], ["batch"], "batch", start=0, end=1),
        helper.make_node("Concat", ["batch", "column"], ["size"], "size", axis=0),
        helper.make_node("Expand", ["frequencies", "size"], ["wide"], "wide"),
        helper.make_node(factor, ["wide", "rows"], ["angles"], "angles"),
        helper.make_node("Transpose", ["angles"], ["turned"], "turned", perm=[0, 2, 1]),
        helper.make_node("Cos", ["turned"], ["cos"], "cosine"),
    ]


CONSTANTS = [
    ("axis", np.array([1])),
    ("column", np.array([4, 1])),
    ("frequencies", np.ones((1, 4, 1), np.float32)),
]


def test_frequencies_that_take_their_size_from_the_ids_are_no_ids(tiny_bundle, tmp_path):
    """As transformers writes it: both factors depend on what is fed, one by its size alone."""
    nodes = rope(mutants.IDS, factor="MatMul")
    bundle = with_decoder(tiny_bundle, tmp_path / "b", nodes, opset=20, constants=CONSTANTS)
    found = read(bundle)
    assert {row.readers for row in found} == {1}
    assert wrong_calls(found) == []


def test_rows_of_a_table_that_the_graph_works_out_are_read(tiny_bundle, tmp_path):
    nodes = [
        helper.make_node("Cos", ["angles"], ["table"], "table"),
        helper.make_node("Gather", ["table", mutants.SLOTS], ["rows"], "rows"),
    ]
    constants = [("angles", np.arange(256, dtype=np.float32)[:, None])]
    bundle = with_decoder(tiny_bundle, tmp_path / "b", nodes, opset=20, constants=constants)
    found = read(bundle)
    assert wrong_calls(found) == STEPS
    assert found[0].reason.startswith("Gather rows sees 1 instead of 23")


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([helper.make_node("Neg", [mutants.IDS], ["minus"])], "no place was found"),
        (
            [
                helper.make_node("Cast", [mutants.IDS], ["floats"], "floats", to=TensorProto.FLOAT),
                helper.make_node("Sin", ["floats"], ["sine"], "sine"),
            ],
            "Sin sine does not read a product of ids and frequencies",
        ),
    ],
    ids=["no rotation", "no frequencies"],
)
def test_a_graph_without_rotary_maths_fails_and_says_what_was_looked_for(
    tiny_bundle, tmp_path, nodes, said
):
    found = read(with_decoder(tiny_bundle, tmp_path / "b", nodes, opset=20))
    assert wrong_calls(found) == STEPS
    assert all(said in row.reason for row in found)


def test_ids_of_an_operator_that_nobody_knows_are_not_read(tiny_bundle, tmp_path):
    nodes = [
        helper.make_node("Nothing", [mutants.IDS], ["strange"], "strange", domain="nobody"),
        *rope("strange"),
    ]
    bundle = with_decoder(
        tiny_bundle, tmp_path / "b", nodes, opset=20, constants=CONSTANTS, domains=["nobody"]
    )
    found = read(bundle)
    assert isinstance(found, PositionsNotRead)
    assert found.reason.startswith(f"the ids inside {DECODER} cannot be read: ONNX Runtime")


def test_a_file_that_is_no_decoder_of_the_bundle_is_refused(tiny_bundle):
    assert read(tiny_bundle, file=DECODER, steps=[0])[0].passed
    with pytest.raises(BundleError, match=rf"vision_encoder.onnx; allowed: {DECODER}"):
        read(tiny_bundle, file="vision_encoder.onnx")
