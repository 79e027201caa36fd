from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gap_export.checkpoint.weights import index_files, place_reference
from gap_export.errors import ExportError
from gap_export.exporting.stamping import is_stampable, shorten, stamp_layers
from gap_export.exporting.trace import (
    OPSET,
    _trace_three_layers,
    describe_interface,
    save_graph,
    trace_component,
)
from gap_export.families.common.modules.clip_vision import ClipVisionTower
from gap_export.families.common.modules.llama_decoder import LlamaDecoder
from gap_export.families.common.modules.projector import build_projector
from gap_export.families.common.modules.pruned_vision import PrunedVisionEncoder, VisionParts
from gap_export.families.common.reference import Component
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.pruning import find_pruner
from gap_export.spec.architecture import DecoderShape, ProjectorShape, VisionShape
from gap_export.spec.manifest import GridSpec, TensorSpec
from tests.conftest import SAMPLE_PRUNING
from tests.exporting import stacks
from tests.exporting.stacks import LAYERS

WEIGHTS = "weights.safetensors"


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def decoder(num_layers: int = LAYERS, dtype: str = "float16", *, num_taps: int = 0) -> Component:
    shape = DecoderShape(
        hidden_size=32,
        intermediate_size=48,
        num_layers=num_layers,
        num_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=40,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        num_taps=num_taps,
    )
    module = LlamaDecoder(shape).to(getattr(torch, dtype))
    module.inv_freq = torch.linspace(1, 0.1, 4)
    cache = [f"{i}.{part}" for i in range(num_layers) for part in ("key", "value")]
    return Component(
        name="decoder_model_merged",
        module=module,
        inputs=(
            spec("inputs_embeds", "batch", "sequence", shape.embeds_size, dtype=dtype),
            spec("attention_mask", "batch", "total", dtype="int64"),
            spec("position_ids", "batch", "sequence", dtype="int64"),
            *(spec(f"past_key_values.{n}", "batch", 2, "past", 8, dtype=dtype) for n in cache),
        ),
        outputs=(
            spec("logits", "batch", 1, 40, dtype=dtype),
            *(spec(f"present.{n}", "batch", 2, "total", 8, dtype=dtype) for n in cache),
        ),
        example_sizes={"batch": 2, "sequence": 5, "past": 7, "total": 12},
        weight_refs=dict.fromkeys(module.state_dict()),  # tracing reads none
        constants={"inv_freq": module.inv_freq.numpy()},
        kv_contract="concat",
        repeated="layers",
        num_leading=num_taps,
    )


def vision() -> Component:
    shape = VisionShape(
        width=32,
        intermediate_size=48,
        num_layers=LAYERS + 1,
        num_heads=4,
        layer_norm_eps=1e-5,
        activation="quick_gelu",
        image_size=32,
        patch_size=8,
    )
    parts = VisionParts(
        tower=ClipVisionTower(shape, num_layers=LAYERS),
        joint_space=None,
        next_layer=None,
        pruner=find_pruner("cls"),
        pruning=dataclasses.replace(SAMPLE_PRUNING, pruner="cls"),
    )
    projector = build_projector(ProjectorShape(width=32, hidden_size=24, activation="gelu"))
    module = PrunedVisionEncoder(parts, projector=projector, grid=GridSpec(rows=4, cols=4))
    return Component(
        name="vision_encoder",
        module=module,
        inputs=(spec("pixel_values", "images", 3, 32, 32),),
        outputs=(
            spec("image_features", "images", 5, 24),
            spec("keep_indices", "images", 5, dtype="int64"),
            spec("token_scores", "images", 16),
        ),
        example_sizes={"images": 2},
        weight_refs=dict.fromkeys(module.state_dict()),
        constants={},
        repeated="tower.encoder.layers",
    )


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def trace(component: Component, folder: Path, *, run_passes: bool = True) -> ir.Model:
    """Trace a component with weights; they are written, and those of the traced one are meta."""
    save_file(component.module.state_dict(), folder / WEIGHTS)
    refs = index_files([folder / WEIGHTS])
    meta = dataclasses.replace(component, module=copy.deepcopy(component.module).to("meta"))
    placed = {key: place_reference(refs[key], WEIGHTS) for key in component.weight_refs}
    model = trace_component(meta, placed=placed)
    if run_passes:
        run_pipeline(model, PIPELINES["vision_encoder"])
    return model


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    save_graph(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options).run(None, feeds)


class Both:
    """A component traced in both ways, each once."""

    def __init__(self, component: Component, folder: Path) -> None:
        # Models this small only lose by handing work to other threads.
        torch.set_num_threads(1)
        randomise(component.module)
        self.component, self.folder = component, folder

    @functools.cached_property
    def stamped(self) -> ir.Model:
        return trace(self.component, self.folder, run_passes=False)

    @functools.cached_property
    def full(self) -> ir.Model:
        whole = dataclasses.replace(self.component, repeated=None)
        return trace(whole, self.folder, run_passes=False)

    def assert_same_outputs(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        stamped, full = (run(model, self.folder, feeds) for model in (self.stamped, self.full))
        assert len(stamped) == len(full) == len(self.component.outputs)
        assert all(np.array_equal(a, b) for a, b in zip(stamped, full, strict=True))
        return stamped


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(decoder(), tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(vision(), tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """A decoder behind whose first layer something is added."""
    return Both(decoder(num_taps=1), tmp_path_factory.mktemp("tapped"))


# Without a layer that stands before the others a tower is traced, too.
DECODERS = [pytest.param("decoders", marks=pytest.mark.full), "tapped"]


@pytest.fixture(params=[*DECODERS, "towers"])
def both(request: pytest.FixtureRequest) -> Both:
    return request.getfixturevalue(request.param)


def test_nodes_come_after_what_they_read(both):
    known = {None, *both.stamped.graph.inputs, *both.stamped.graph.initializers.values()}
    for node in both.stamped.graph:
        assert known.issuperset(node.inputs)
        known.update(node.outputs)
    assert known.issuperset(both.stamped.graph.outputs)


def test_stamped_graph_has_the_nodes_of_the_traced_one(both):
    stamped, full = (
        Counter((node.domain, node.op_type, len(node.inputs)) for node in model.graph)
        for model in (both.stamped, both.full)
    )
    assert stamped == full


def test_weights_inputs_and_outputs_are_those_of_the_traced_one_in_order(both):
    assert describe_interface(both.stamped) == describe_interface(both.full)
    assert describe_interface(both.stamped) == (both.component.inputs, both.component.outputs)
    weights, wanted = (
        {
            name: (value.dtype, str(value.shape), getattr(value.const_value, "offset", None))
            for name, value in model.graph.initializers.items()
        }
        for model in (both.stamped, both.full)
    )
    assert weights == wanted and list(weights) == list(wanted)
    assert weights.keys() == both.component.weight_refs.keys() | both.component.constants.keys()


def test_names_are_unique_and_count_on_as_torchs_do(both):
    names, wanted = (
        [str(value.name) for node in model.graph for value in node.outputs]
        for model in (both.stamped, both.full)
    )
    assert len(set(names)) == len(names)
    assert len({node.name for node in both.stamped.graph}) == len(both.stamped.graph)
    assert names[-1] == wanted[-1]

    # Some numbers, as of add_7, also count the symbols, of which three layers have fewer.
    def stem(name: str) -> str:
        return name.rstrip("0123456789")

    assert list(map(stem, names)) == list(map(stem, wanted))
    counted = ("val_", "linear_", "transpose_", "present.", "softmax_")
    assert [n for n in names if n.startswith(counted)] == [
        n for n in wanted if n.startswith(counted)
    ]


def test_scopes_are_those_of_the_traced_one(both):
    stamped, full = (
        Counter(
            ast.rpartition("', '")[0]
            for node in model.graph
            if (ast := node.metadata_props.get("pkg.torch.onnx.name_scopes"))
        )
        for model in (both.stamped, both.full)
    )
    assert stamped == full


def test_stamping_leaves_the_module_as_it_is(both):
    number = len(both.component.module.get_submodule(both.component.repeated))
    lead = both.component.num_leading
    short = shorten(both.component)
    assert len(short.module.get_submodule(both.component.repeated)) == 3 + lead
    assert len(both.component.module.get_submodule(both.component.repeated)) == number
    key = f"{both.component.repeated}.%d."
    whole, three = both.component.module.state_dict(), short.module.state_dict()
    kept = [(index, index) for index in range(lead + 2)]
    for ours, theirs in (*kept, (number - 1, lead + 2)):
        names = [name for name in whole if name.startswith(key % ours)]
        assert names
        for name in names:
            taken = three[name.replace(key % ours, key % theirs)]
            assert taken.data_ptr() == whole[name].data_ptr()


@pytest.mark.parametrize("which", DECODERS)
@pytest.mark.parametrize(("fed", "past"), [(6, 0), (1, 9)])
def test_decoder_gives_the_same_bits(request, which, fed, past):
    decoders = request.getfixturevalue(which)
    rng = np.random.default_rng(fed)
    width = decoders.component.inputs[0].shape[2]
    feeds = {
        "inputs_embeds": rng.normal(size=(2, fed, width)).astype(np.float16),
        "attention_mask": np.ones((2, past + fed), np.int64),
        "position_ids": np.arange(past, past + fed)[None].repeat(2, 0),
    }
    for value in decoders.component.inputs[3:]:
        feeds[value.name] = rng.normal(size=(2, 2, past, 8)).astype(np.float16)
    logits, *caches = decoders.assert_same_outputs(feeds)
    assert np.isfinite(logits).all() and logits.std() > 0
    with torch.inference_mode():
        wanted = decoders.component.module(*(torch.from_numpy(feed) for feed in feeds.values()))
    assert np.abs(logits.astype(np.float32) - wanted[0].float().numpy()).max() < 0.02
    for cache, like in zip(caches, wanted[1:], strict=True):
        assert np.abs(cache.astype(np.float32) - like.float().numpy()).max() < 0.02


def test_half_precision_decoder_computes_nothing_in_double(tapped):
    for node in tapped.stamped.graph:
        assert all(value.dtype != ir.DataType.DOUBLE for value in node.outputs)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                assert attribute.as_tensor().dtype != ir.DataType.DOUBLE
        assert node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.DOUBLE


def test_vision_tower_gives_the_same_bits(towers):
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    features, keep, _ = towers.assert_same_outputs({"pixel_values": pixels})
    with torch.inference_mode():
        wanted, indices, _ = towers.component.module(torch.from_numpy(pixels))
    assert np.array_equal(keep, indices.numpy())
    assert np.abs(features - wanted.numpy()).max() < 1e-4


def toy(module: nn.Module, *, outputs: tuple[str, ...] = ("out",)) -> Component:
    randomise(module)
    return Component(
        name="toy",
        module=module,
        inputs=(spec("values", "rows", 4),),
        outputs=tuple(spec(name, "rows", 4) for name in outputs),
        example_sizes={"rows": 3},
        weight_refs=dict.fromkeys(module.state_dict()),
        constants={},
        repeated="layers",
    )


@pytest.fixture
def reasons() -> Iterator[list[str]]:
    """Why components were traced whole, as logged. Other loggers' thousands of lines cost time."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("gap_export.exporting.trace")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize("odd", [{}, {0: stacks.OtherLayer()}])
def test_stack_is_stamped_whatever_its_first_layer(odd, tmp_path, reasons):
    assert_equals_pytorch(stacks.Stack(odd), tmp_path)
    assert reasons == []


def test_stack_that_is_not_alike_is_traced_whole(tmp_path, reasons):
    assert_equals_pytorch(stacks.Stack({3: stacks.OtherLayer()}), tmp_path)
    assert reasons == [
        "toy is traced layer by layer: layers cannot be stamped out: a layer is made differently: "
        "layers.3"
    ]


def assert_equals_pytorch(module: nn.Module, folder: Path) -> None:
    model = trace(toy(module), folder)
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    found = run(model, folder, {"values": values.numpy()})[0]
    assert np.abs(found - module(values).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (stacks.Stack({0: stacks.Layer(gain=3.0)}), "layers differ in length"),
        (stacks.Stack({2: stacks.Layer(gain=3.0)}), "made differently: layers.2"),
        (stacks.Stack({4: stacks.OtherLayer()}), "differ in a node: node_tanh_1, then node_relu"),
        (stacks.Stack({4: stacks.Layer(gain=3.0)}), "layers differ in length"),
        (stacks.ReadsAnEarlierLayer(), "outside the layers reads what is one layer's: node_add"),
        (stacks.DoesWithoutTheLastLayer(), "no nodes are marked as a layer's: module.layers"),
        (stacks.WorksBetweenLayers(), "layers do not follow each other"),
        (stacks.ReachesBackTwoLayers(), "layers read differently"),
        (stacks.ReadsTheFirstLayer(), "layers read differently"),
        (stacks.ReadsAWeightOfALayer(), "outside the layers reads what is one layer's: node_add"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trace_that_does_not_tell_how_layers_go_on_is_not_used(module, why, reasons):
    component = toy(module.to("meta"))
    assert _trace_three_layers(component, OPSET) is None
    assert len(reasons) == 1 and why in reasons[0]


def test_output_of_an_earlier_layer_is_not_stamped(reasons):
    component = toy(stacks.GivesOutAnEarlierLayer().to("meta"), outputs=("out", "before"))
    assert _trace_three_layers(component, OPSET) is None
    assert reasons[0].endswith("an output is one layer's: before")


def test_only_deep_stacks_are_stamped():
    assert is_stampable(decoder(4)) and not is_stampable(decoder(3))
    assert not is_stampable(dataclasses.replace(decoder(4), repeated=None))
    assert is_stampable(decoder(6, num_taps=2)) and not is_stampable(decoder(5, num_taps=2))


def test_short_decoder_has_the_caches_of_three_layers():
    short = shorten(decoder())
    assert [value.name for value in short.inputs[3:]] == [
        f"past_key_values.{i}.{part}" for i in range(3) for part in ("key", "value")
    ]
    assert [value.name for value in short.outputs] == [
        "logits", *(f"present.{i}.{part}" for i in range(3) for part in ("key", "value"))
    ]  # fmt: skip
    assert short.repeated is None and short.example_sizes == decoder().example_sizes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda specs: specs[:-1],
            r"caches differ from layer to layer: past_key_values\.\*\.value",
        ),
        (lambda specs: (*specs[:-2], specs[-1]), r"caches differ .*: past_key_values\.\*\.key"),
        (lambda specs: (*specs[:3], *specs[5:]), "not declared layer by layer"),
        (
            lambda specs: tuple(
                dataclasses.replace(s, shape=("batch", 4, "past", 8)) if ".2." in s.name else s
                for s in specs
            ),
            r"caches differ from layer to layer: past_key_values\.\*\.key",
        ),
    ],
)
def test_caches_that_do_not_go_layer_by_layer_are_refused(change, why):
    component = decoder()
    with pytest.raises(ExportError, match=why):
        shorten(dataclasses.replace(component, inputs=change(component.inputs)))


def test_graph_without_the_exporters_scopes_is_refused():
    graph = ir.Graph([], [], nodes=[ir.Node("", "Identity", [ir.Value(name="x")])])
    with pytest.raises(ExportError, match="no nodes are marked as a layer's"):
        stamp_layers(graph, decoder(), root="module")
