"""Where a graph begins to be wrong is named: the tensor, its operator and its module."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import UsageError
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.families import build_reference
from gap_export.parity.inside import changed_nodes, divergence, graph_search
from gap_export.parity.inside.divergence import compare_layers, find_divergence
from gap_export.parity.inside.reference_taps import ReferenceTaps
from gap_export.parity.quantized import use_quantized_weights
from gap_export.parity.replay import RecordingBackend
from gap_export.progress import SilentProgress
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import QuantizationSpec
from tests.parity import mutants

COMPONENTS = ("text_encoder", "vision_encoder", "embed_tokens", "decoder_model_merged")
PREFILL, FIRST_STEP = 0, 1


class Question:
    """One question to PyTorch, its calls, and what is to be looked into beside them."""

    def __init__(self, bundle, reference, recipe, checkpoint):
        manifest = open_bundle(bundle).manifest
        recorder = RecordingBackend(TorchBackend(reference))
        image = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
        GroundingSession(manifest, bundle, recorder).ground(image, "the red circle")
        self.calls = recorder.calls
        self.taps = ReferenceTaps(
            reference=reference,
            recipe=recipe,
            checkpoint=Checkpoint.of(checkpoint),
            pruning=manifest.pruning,
        )

    def call(self, component, number=0):
        of_component = [c for c in self.calls if c.component == component]
        return of_component[number]

    def find(self, bundle, component, number=0, **options):
        call = self.call(component, number)
        options = {"calls": self.calls} | options
        return find_divergence(open_bundle(bundle), component, call, self.taps, **options)

    def compare(self, bundle, component, number=0):
        call = self.call(component, number)
        return compare_layers(open_bundle(bundle), component, call, self.taps, calls=self.calls)


@pytest.fixture(scope="module")
def question(tiny_bundle, tiny_graphs):
    reference = tiny_graphs.reference()
    return Question(tiny_bundle, reference, tiny_graphs.recipe, tiny_graphs.checkpoint)


@pytest.mark.parametrize(
    ("component", "number"),
    [
        ("vision_encoder", 0),
        ("embed_tokens", 0),
        ("decoder_model_merged", PREFILL),
        ("decoder_model_merged", FIRST_STEP),
        ("decoder_model_merged", 2),
    ],
)
def test_an_honest_graph_diverges_nowhere(question, tiny_bundle, component, number):
    assert question.find(tiny_bundle, component, number) is None


def test_a_text_encoder_is_looked_into_as_well(tiny_text_bundle, tiny_graphs):
    asked = Question(
        tiny_text_bundle, tiny_graphs.reference("text"), tiny_graphs.recipe, tiny_graphs.checkpoint
    )
    for component in COMPONENTS:
        assert asked.find(tiny_text_bundle, component) is None
        assert asked.compare(tiny_text_bundle, component)


@pytest.mark.parametrize(
    ("mutant", "number", "operator", "tensor", "module", "cause"),
    [
        (
            mutants.gap_node_removed, PREFILL,
            "GapRemap", "original_position_ids", "", "the graph lacks this GapRemap",
        ),
        (
            mutants.neighbour_in_table, PREFILL,
            "GapRemap", "original_position_ids", "", "this GapRemap does not compute what",
        ),
        (
            mutants.decode_offset_lost, FIRST_STEP,
            "GapRemap", "original_position_ids", "", "this GapRemap does not compute what",
        ),
        (
            mutants.table_off_by_one, PREFILL,
            "Add", "shifted_table", "", "the graph has this Add before original_position_ids",
        ),
        (
            mutants.weight_transposed, PREFILL,
            "Gemm", "linear_7", "layers.1.self_attn.q_proj", "it is transposed",
        ),
        (
            mutants.weight_zeroed, FIRST_STEP,
            "Gemm", "linear_6", "layers.0.mlp.down_proj", "all of it is zero",
        ),
        (
            mutants.rows_and_columns_swapped, None,
            "Transpose", "turned_grid", "tower", "the graph has this Transpose before view",
        ),
        (
            mutants.transpose_swapped, None,
            "Transpose", "transpose_5", "tower.encoder.layers.0.self_attn",
            "this Transpose does not compute what",
        ),
        (
            mutants.color_order, None,
            "Conv", "conv2d", "tower.embeddings.patch_embedding", "4096 of 6144 values differ",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_operator_and_module(
    question, tiny_bundle, tmp_path, mutant, number, operator, tensor, module, cause
):
    component = "vision_encoder" if number is None else "decoder_model_merged"
    bundle = mutant(tiny_bundle, tmp_path / "mutant")
    found = question.find(bundle, component, number or 0)
    assert (found.operator, found.tensor, found.module) == (operator, tensor, module)
    assert cause in found.cause
    assert found.max_abs_diff > found.allowed
    assert found.component == component
    assert found.call == {PREFILL: "prefill", FIRST_STEP: "decode 1", None: component}[number]
    assert found.last_agreeing not in {"", found.tensor}


def test_a_fault_of_decode_steps_alone_is_none_of_prefill(question, tiny_bundle, tmp_path):
    bundle = mutants.decode_offset_lost(tiny_bundle, tmp_path / "mutant")
    assert question.find(bundle, "decoder_model_merged", PREFILL) is None


def edit_node(op_type, edit, *, number=0):
    def apply(model):
        edit([node for node in model.graph.node if node.op_type == op_type][number])

    return apply


def other_operator(node):
    node.op_type = "Sub"


def other_input(node):
    node.input[0] = node.input[1]


@pytest.mark.parametrize(
    ("op_type", "edit", "number", "module", "cause"),
    [
        # The residual stream past the first attention, and a rotation's sum.
        ("Add", other_operator, "linear_3", "layers.0", "this is a Sub, where an export has a Add"),
        ("Add", other_operator, "mul_112", "layers.0.self_attn", "this is a Sub, where an"),
        ("Mul", other_input, "linear_5", "layers.0.mlp", "it reads linear_5, linear_5; of an"),
    ],
)
def test_an_operator_between_modules_belongs_to_what_holds_them(
    question, tiny_bundle, tmp_path, op_type, edit, number, module, cause
):
    def apply(model):
        (node,) = (n for n in model.graph.node if n.op_type == op_type and number in n.input)
        edit(node)

    bundle = mutants.rewrite_graph(tiny_bundle, tmp_path / "b", mutants.DECODER, apply)
    found = question.find(bundle, "decoder_model_merged")
    assert found.module == module
    assert found.cause.startswith(cause)


def test_a_graph_with_other_names_is_searched_as_far_as_its_modules(
    question, tiny_bundle, tmp_path
):
    """As one of another version: which node is which cannot be told."""

    def apply(model):
        mutants.gap_node(model).input[1] = mutants.SLOTS
        weights = {one.name for one in model.graph.initializer}
        fixed = weights | {v.name for v in (*model.graph.input, *model.graph.output)}
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [n if n in fixed or not n else f"renamed_{n}" for n in names]

    bundle = mutants.rewrite_graph(tiny_bundle, tmp_path / "b", mutants.DECODER, apply)
    found = question.find(bundle, "decoder_model_merged")
    # Keys are the first of what depends on ids that is given out.
    assert (found.tensor, found.operator) == ("present.0.key", "Concat")
    assert "nodes have other names" in found.cause


def test_a_runtime_that_computes_otherwise_is_told_from_a_wrong_graph(
    question, tiny_bundle, monkeypatch
):
    """From one value on all comes out wrong, whichever graph is run."""
    honest = graph_search.run_taps

    def wrong(graph, names, feed):
        first = graph.producers["linear_4"]
        return {
            name: 2 * value if graph.producers.get(name, 0) >= first else value
            for name, value in honest(graph, names, feed).items()
        }

    monkeypatch.setattr(graph_search, "run_taps", wrong)
    monkeypatch.setattr(changed_nodes, "run_taps", wrong)
    found = question.find(tiny_bundle, "decoder_model_merged")
    assert (found.operator, found.module) == ("Gemm", "layers.0.mlp.gate_proj")
    assert found.cause.endswith("the runtime may compute otherwise")


def test_bisection_finds_the_first_of_many_chunks(question, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK", 1)
    looked = []
    honest = graph_search.run_taps

    def counting(graph, names, feed):
        looked.append(len(names))
        return honest(graph, names, feed)

    monkeypatch.setattr(graph_search, "run_taps", counting)
    bundle = mutants.weight_transposed(tiny_bundle, tmp_path / "mutant")
    found = question.find(bundle, "decoder_model_merged")
    assert (found.tensor, found.last_agreeing) == ("linear_7", "mul_367")
    # One at a time, and no more of them than it takes to halve some thirty.
    assert set(looked) == {1}
    assert len(looked) <= 6


def test_a_decode_step_needs_the_calls_before_it(question, tiny_bundle):
    with pytest.raises(UsageError, match="without the calls before it: a cache of 0 slots"):
        question.find(tiny_bundle, "decoder_model_merged", FIRST_STEP, calls=())
    # Prefill does not.
    assert question.find(tiny_bundle, "decoder_model_merged", PREFILL, calls=()) is None


def test_a_reference_of_another_dtype_is_refused(question, tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    graphs = tuple(replace(graph, dtype="float16") for graph in bundle.manifest.graphs)
    half = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
    call = question.call("vision_encoder")
    with pytest.raises(UsageError, match="of its own dtype: float32; allowed: float16"):
        find_divergence(half, "vision_encoder", call, question.taps)


def test_layers_are_compared_one_by_one(question, tiny_bundle, tmp_path):
    rows = question.compare(tiny_bundle, "decoder_model_merged", FIRST_STEP)
    assert all(row.passed for row in rows)
    # Two layers of seven linear layers and two norms, the last norm and the LM head.
    assert len(rows) == 20
    assert [row.module for row in rows[:2]] == [
        "layers.0.input_layernorm",
        "layers.0.self_attn.q_proj",
    ]
    assert rows[1].tensor == "linear (decode)"
    assert all(0 < row.max_abs_diff < 0.1 * row.atol for row in rows[1:])
    assert all(row.cosine > 1 - 1e-9 for row in rows)

    zeroed = mutants.weight_zeroed(tiny_bundle, tmp_path / "mutant")
    rows = question.compare(zeroed, "decoder_model_merged", PREFILL)
    wrong = [row.module for row in rows if not row.passed]
    order = [row.module for row in rows]
    assert wrong == order[order.index("layers.0.mlp.down_proj") :]
    assert rows[1].tensor == "linear (prefill)"


def test_layers_of_a_vision_encoder_are_those_that_are_run(question, tiny_bundle):
    rows = question.compare(tiny_bundle, "vision_encoder")
    modules = [row.module for row in rows]
    assert modules[0] == "tower.embeddings.patch_embedding"
    assert modules[-1].startswith("projector.")
    assert all(row.passed for row in rows)
    # Positions are added from a table that no module is run for.
    assert "tower.embeddings.position_embedding" not in modules
    (row,) = question.compare(tiny_bundle, "embed_tokens")
    assert (row.module, row.max_abs_diff) == ("embed_tokens", 0)


@pytest.mark.full
def test_activations_that_overflow_float16_are_found(
    exports, tiny_checkpoint, tiny_recipe, tmp_path
):
    half = exports.bundle(
        model=str(tiny_checkpoint), pruner="spatial", keep_ratio=0.3, dtype="float16"
    )
    pruning = open_bundle(half).manifest.pruning
    checkpoint = Checkpoint.of(tiny_checkpoint)
    reference = build_reference(tiny_recipe, checkpoint, pruning, device="cpu", dtype="float16")
    asked = Question(half, reference, tiny_recipe, tiny_checkpoint)
    for component in ("vision_encoder", "decoder_model_merged"):
        assert asked.find(half, component) is None
    bundle = mutants.activations_overflow(half, tmp_path / "mutant")
    found = asked.find(bundle, "decoder_model_merged")
    assert (found.operator, found.module) == ("Gemm", "layers.0.mlp.up_proj")
    assert found.max_abs_diff == float("inf")


@pytest.mark.full
def test_int4_weights_are_looked_into_by_what_they_stand_for(
    exports, tiny_checkpoint, tiny_recipe, tmp_path
):
    spec = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
    out = exports.bundle(model=str(tiny_checkpoint), keep_ratio=0.3, quantization=spec)
    pruning = open_bundle(out).manifest.pruning
    checkpoint = Checkpoint.of(tiny_checkpoint)
    reference = build_reference(tiny_recipe, checkpoint, pruning, device="cpu")
    use_quantized_weights(reference, out, spec, progress=SilentProgress())
    asked = Question(out, reference, tiny_recipe, tiny_checkpoint)
    asked.taps = replace(asked.taps, quantization=spec)
    assert asked.find(out, "decoder_model_merged", FIRST_STEP) is None
    assert len(asked.compare(out, "decoder_model_merged")) == 20
    found = asked.find(mutants.gap_node_removed(out, tmp_path / "m"), "decoder_model_merged")
    assert (found.operator, found.tensor) == ("GapRemap", "original_position_ids")
