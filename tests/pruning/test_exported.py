"""Pruners as graphs, without a tower: ONNX Runtime against PyTorch, and built by TensorRT for RTX.

By default each pruner with all that it can do, and one with every choice; every combination with
``-m full``.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from gap_export.exporting.trace import save_graph, trace_component
from gap_export.families.common.modules.pruned_vision import (
    JointSpace,
    PrunedVisionEncoder,
    ScoredVisionEncoder,
    TokenPruner,
    VisionFeatures,
    VisionParts,
)
from gap_export.families.common.reference import Component
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.pruning import PRESETS, FixedPruner, ScoringPruner, find_preset
from gap_export.spec.manifest import GridSpec, PruningSpec, TensorSpec
from gap_export.spec.places import rope_sums, token_places
from gap_export.spec.positions import (
    VisualSpan,
    build_kept_positions,
    compact_positions,
)
from tests.graph.lowering_models import Family

GRID = GridSpec(rows=6, cols=7)
N, WIDTH, HIDDEN, KEPT = 42, 16, 16, 13


class FakeTower(nn.Module):
    """Takes pixel_values [I, 3, N, D] apart: features, and all that is read of a tower besides."""

    def forward(self, pixel_values: torch.Tensor) -> VisionFeatures:
        patches, keys, rest = pixel_values[:, 0], pixel_values[:, 1, :, :4], pixel_values[:, 2]
        return VisionFeatures(
            patches=patches,
            cls=rest[:, 0],
            cls_attention=torch.softmax(rest[:, :, 1], dim=-1),
            received_attention=torch.softmax(rest[:, :, 2], dim=-1),
            keys=keys,
        )


class FakeNextLayer(nn.Module):
    def forward(self, features: VisionFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.matmul(features.patches, features.cls[:, :, None])[:, :, 0]
        return torch.softmax(logits, dim=-1), features.patches.flip(2)


class Double(nn.Module):
    """A projector without weights."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return 2 * features[..., :HIDDEN]


class FakeJointSpace(JointSpace):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches[:, :, :5]


def request(name, order, extra, position="last", budget="fixed") -> PruningSpec:
    return PruningSpec(
        pruner=name, order=order, extra_token=extra, positions="gap", keep_ratio=0.3, seed=3,
        num_visual_tokens=N, num_kept_tokens=KEPT, num_emitted_tokens=KEPT + (extra != "none"),
        text_similarity_sign=-1 if "text" in find_preset(name).pruner.reads else None,
        extra_position=position, budget=budget,
    )  # fmt: skip


def text_width(pruner) -> int:
    return HIDDEN if "llm_text" in pruner.reads else 5


def make_component(pruning: PruningSpec) -> Component:
    pruner = find_preset(pruning.pruner).pruner
    parts = VisionParts(
        tower=FakeTower(),
        joint_space=FakeJointSpace() if "text" in pruner.reads else None,
        next_layer=FakeNextLayer(),
        pruner=pruner,
        pruning=pruning,
    )
    # The module asks its weights for the dtype.
    inputs, rows = [spec("pixel_values", "num_images", 3, N, WIDTH)], "num_images"
    if pruner.reads_text:
        inputs.append(spec("text_embeds", "batch_size", text_width(pruner)))
        rows = "batch_size"
    scores = spec("token_scores", rows, N)
    constants = {}
    if pruning.budget == "adaptive":
        module = ScoredVisionEncoder(parts)
        outputs = [scores, spec("patch_features", rows, N, WIDTH)]
        if pruner.merges_by:
            width = WIDTH if pruner.merges_by == "next_keys" else 4
            outputs.append(spec("patch_keys", rows, N, width))
    else:
        with torch.device("meta"):
            module = PrunedVisionEncoder(parts, projector=Double(), grid=GRID)
        emitted = pruning.num_emitted_tokens
        outputs = [
            spec("image_features", rows, emitted, HIDDEN),
            spec("keep_indices", rows, emitted, dtype="int64"),
        ]
        if isinstance(pruner, ScoringPruner):
            outputs.append(scores)
        if "places" in pruner.reads:
            constants["places"] = token_places(GRID)
        if "rope_sums" in pruner.reads:
            constants["rope_sums"] = rope_sums(GRID, Family(recipe="", pruner="").decoder_shape)
        if isinstance(pruner, FixedPruner):
            places = pruner.places(GRID, num_kept_tokens=KEPT, seed=3)
            constants["fixed_places"] = np.sort(places) if pruning.order == "raster" else places
    module.register_parameter("dtype_of_weights", nn.Parameter(torch.zeros(1, device="meta")))
    return Component(
        name="vision_encoder",
        module=module,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        example_sizes={"num_images": 2, "batch_size": 3},
        weight_refs={},
        constants=constants,
    )


def make_token_pruner(pruning: PruningSpec) -> Component:
    pruner = find_preset(pruning.pruner).pruner
    emitted = "num_kept_tokens" if pruning.extra_token == "none" else "num_kept_tokens + 1"
    inputs = [
        spec("kept_slots", "num_kept_tokens", dtype="int64"),
        spec("token_scores", "batch_size", N),
        spec("patch_features", "batch_size", N, WIDTH),
    ]
    if pruner.merges_by:
        inputs.append(spec("patch_keys", "batch_size", N, WIDTH))
    return Component(
        name="token_pruner",
        module=TokenPruner(projector=Double(), pruner=pruner, pruning=pruning, grid=GRID),
        inputs=tuple(inputs),
        outputs=(
            spec("image_features", "batch_size", emitted, HIDDEN),
            spec("keep_indices", "batch_size", emitted, dtype="int64"),
        ),
        example_sizes={"batch_size": 2, "num_kept_tokens": 3},
        weight_refs={},
        constants={},
    )


def spec(name: str, *shape, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def export(component: Component, path: Path) -> Path:
    model = trace_component(component, placed={})
    run_pipeline(model, PIPELINES[component.name])
    save_graph(model, path)
    return path


def run(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def random_pixels(seed: int, images: int, *, ties: bool) -> np.ndarray:
    pixels = np.random.default_rng(seed).normal(size=(images, 3, N, WIDTH)).astype(np.float32)
    # Vectors of -1 and 1 have exact lengths and cosines, so that ties are ties in any runtime.
    return np.where(pixels > 0, np.float32(1), np.float32(-1)) if ties else pixels


# Extra token: the order and the place it is tried with by default.
BY_EXTRA = {
    "none": ("raster", "last"),
    "mean": ("score", "last"),
    "weighted": ("raster", "centroid"),
}
CHOICES = [
    (name, order, extra)
    for name, preset in PRESETS.items()
    for order, extra in itertools.product(preset.pruner.orders, preset.pruner.extra_tokens)
]
# They share a rule with another one, and differ in what they read.
VARIANTS = (
    *("fastervlm-received", "visionzip-received", "text-llm"),
    *("cdpruner-llm", "extent-llm", "d2pruner-llm", "nuwa-received", "ivc-text-llm"),
)
# What these read, text-llm or visionzip-received reads as well.
SELDOM = ("cdpruner-llm", "extent-llm", "d2pruner-llm", "nuwa-received", "ivc-text-llm")
# What a pruner has not in common with others is its scores and what it merges by.
RICHEST = [
    (name, order, extra)
    for name, order, extra in CHOICES
    if (
        (order, extra) == ("raster", "none")
        if name in VARIANTS
        else extra == PRESETS[name].pruner.extra_tokens[-1]
        and order == (BY_EXTRA[extra][0] if len(PRESETS[name].pruner.orders) > 1 else order)
    )
]
DEFAULT = [choice for choice in RICHEST if choice[0] not in SELDOM]
DEFAULT += [choice for choice in CHOICES if choice[0] == "cls" and choice not in RICHEST]


def check_graph(name, order, extra, folder, places):
    for place in places:
        component = make_component(request(name, order, extra, place))
        path = export(component, folder / f"{name}-{order}-{extra}-{place}.onnx")
        module = component.module.to_empty(device="cpu")
        for buffer, value in component.constants.items():
            module.register_buffer(buffer, torch.from_numpy(value), persistent=False)
        rng = np.random.default_rng(1)
        # What would tie is told apart by rounding, where sums are divided.
        is_tied = "cdpruner" not in name and "d2pruner" not in name
        for seed, ties in itertools.product(range(3), (False, is_tied)):
            feed = {"pixel_values": random_pixels(seed, 2, ties=ties)}
            if len(component.inputs) == 2:
                text = rng.normal(size=(2, component.inputs[1].shape[1])).astype(np.float32)
                feed["text_embeds"] = np.sign(text) if ties else text
            with torch.inference_mode():
                wanted = [t.numpy() for t in module(*map(torch.from_numpy, feed.values()))]
            found = run(path, feed)
            assert np.array_equal(found[1], wanted[1]), (name, order, extra, ties)
            assert np.abs(found[0] - wanted[0]).max() < 1e-4
            for keep in found[1]:
                check_positions(keep)
        yield path


def check_positions(keep: np.ndarray) -> None:
    """The table that both modes are fed: survivors' own ids, or none at all."""
    span = VisualSpan(start=5, num_visual_tokens=N, keep_indices=keep)
    table = build_kept_positions(unpruned_length=5 + N + 4, spans=[span])
    for mode in ("gap", "compact"):
        fed = table if mode == "gap" else compact_positions(len(table))
        own = fed[5 : 5 + len(keep)]
        assert np.array_equal(own, 5 + (keep if mode == "gap" else np.arange(len(keep))))
        assert fed[-1] == (5 + N + 3 if mode == "gap" else len(table) - 1)


@pytest.mark.parametrize(("name", "order", "extra"), DEFAULT)
def test_graph_equals_pytorch_for_each_pruner_and_each_choice(name, order, extra, tmp_path):
    _, place = BY_EXTRA[extra]
    (path,) = check_graph(name, order, extra, tmp_path, [place])
    # With all the pruner can do.
    if extra == find_preset(name).pruner.extra_tokens[-1]:
        assert build(path)


@pytest.mark.full
@pytest.mark.parametrize(("name", "order", "extra"), CHOICES)
def test_graph_equals_pytorch_and_builds_for_all_choices(name, order, extra, tmp_path):
    for path in check_graph(name, order, extra, tmp_path, ("last", "centroid")):
        assert build(path)


ADAPTIVE = [name for name, preset in PRESETS.items() if "adaptive" in preset.budgets]


# The order is one rule for all of them.
TOKENS = {*((name, "raster", "weighted") for name in ADAPTIVE), (ADAPTIVE[0], "score", "none")}


@pytest.mark.parametrize(
    ("name", "order", "extra"),
    [
        pytest.param(*choice, marks=[] if choice in TOKENS else [pytest.mark.full])
        for choice in itertools.product(ADAPTIVE, ("raster", "score"), BY_EXTRA)
    ],
)
def test_token_pruner_takes_any_number(name, order, extra, tmp_path):
    pruning = request(name, order, extra, "centroid", budget="adaptive")
    component = make_token_pruner(pruning)
    path = export(component, tmp_path / "pruner.onnx")
    fixed = make_component(request(name, order, extra, "centroid")).module.to_empty(device="cpu")
    scored = make_component(pruning).module.to_empty(device="cpu")
    feed = {"pixel_values": random_pixels(7, 2, ties=False)}
    if "text" in find_preset(name).pruner.reads:
        feed["text_embeds"] = np.ones((2, 5), dtype=np.float32)
    given = [torch.from_numpy(value) for value in feed.values()]
    with torch.inference_mode():
        parts = [part.numpy() for part in scored(*given)]
        # As many as a fixed budget has: the very same tokens.
        wanted = [part.numpy() for part in fixed(*given)]
    names = ("token_scores", "patch_features", "patch_keys")
    feed = dict(zip(names, parts, strict=False))
    found = run(path, feed | {"num_kept_tokens": np.array([KEPT])})
    assert np.array_equal(found[1], wanted[1]) and np.abs(found[0] - wanted[0]).max() < 1e-4
    for number in (1, 2, N - 1):
        with torch.inference_mode():
            slots = torch.arange(number)
            wanted = component.module(slots, *map(torch.from_numpy, parts))
        found = run(path, feed | {"num_kept_tokens": np.array([number])})
        assert np.array_equal(found[1], wanted[1].numpy())
        assert np.abs(found[0] - wanted[0].numpy()).max() < 1e-4
    if extra != "none":
        assert build(path)


def build(path: Path) -> bytes:
    """The plan for a desktop GPU; the test fails, or is skipped, where there is none."""
    from tests.engines.sm89 import build_plan

    rows = (1, 1, 2)
    return build_plan(
        path, {"num_images": rows, "batch_size": rows, "num_kept_tokens": (1, 8, N - 1)}
    )
