"""The exact oracle on the tiny LLaVA, in PyTorch and in the exported graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gap_export.spec.positions import (
    VisualSpan,
    build_kept_positions,
    compact_positions,
    stack_tables,
)
from tests.families.masked_oracle import (
    ATOL,
    Decoder,
    check_masked_oracle,
    embed,
    onnx_decoder,
    random_ids,
    run,
    run_masked,
    spliced,
    torch_decoder,
)

PRUNERS = ("cls", "text", "random", "spatial", "fastervlm", "extent", "ivc-extent")
NUM_VISUAL = 16


def in_torch(graphs: Any) -> Decoder:
    return torch_decoder(graphs.reference())


def in_onnx(graphs: Any, *, bare: bool = False) -> Decoder:
    return onnx_decoder(graphs.session("decoder_model_merged", bare=bare))


def visual_features(graphs: Any) -> np.ndarray:
    """All N projected features of one image, [N, H]."""
    with torch.inference_mode():
        features, _, *_ = graphs.reference("spatial", 1.0).vision_encoder(image())
    return features.numpy()[0]


def image() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def kept_by(graphs: Any, pruner: str, keep_ratio: float, *, onnx: bool) -> np.ndarray:
    """keep_indices [K] of the image, by the graph or by PyTorch."""
    reference = graphs.reference(pruner, keep_ratio)
    feeds = {"pixel_values": image()}
    if reference.text_encoder is not None:
        with torch.inference_mode():
            feeds["text_embeds"] = reference.text_encoder(torch.tensor([[1, 12, 15, 2]]))
    if onnx:
        session = graphs.session("vision_encoder", pruner, keep_ratio)
        return session.run(["keep_indices"], {k: v.numpy() for k, v in feeds.items()})[0][0]
    with torch.inference_mode():
        return reference.vision_encoder(*feeds.values())[1].numpy()[0]


def unpruned_prompt(graphs: Any, before: int, after: int) -> np.ndarray:
    """Text, image, text: [1, L, H]."""
    return spliced(graphs.reference(), visual_features(graphs), before=before, after=after)


def check_oracle(graphs: Any, decode: Decoder, keep: np.ndarray, *, before: int, after: int):
    full = unpruned_prompt(graphs, before, after)
    table = build_kept_positions(
        unpruned_length=full.shape[1],
        spans=[VisualSpan(start=before, num_visual_tokens=NUM_VISUAL, keep_indices=keep)],
    )
    check_masked_oracle(graphs.reference(), decode, full, table)


@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_oracle_holds_in_pytorch(tiny_graphs, pruner, keep_ratio):
    keep = kept_by(tiny_graphs, pruner, keep_ratio, onnx=False)
    check_oracle(tiny_graphs, in_torch(tiny_graphs), keep, before=5, after=4)


@pytest.mark.parametrize(
    ("pruner", "keep_ratio"),
    [
        *((pruner, 0.3) for pruner in PRUNERS),
        ("text", 1.0),
        # All keep the same then.
        *(pytest.param(name, 1.0, marks=pytest.mark.full) for name in PRUNERS if name != "text"),
    ],
)
def test_oracle_holds_in_onnx_graphs(tiny_graphs, pruner, keep_ratio):
    keep = kept_by(tiny_graphs, pruner, keep_ratio, onnx=True)
    check_oracle(tiny_graphs, in_onnx(tiny_graphs), keep, before=5, after=4)


@pytest.mark.parametrize("build", [in_torch, in_onnx])
@pytest.mark.parametrize(("before", "after"), [(0, 6), (1, 1), (20, 1), (3, 30)])
def test_oracle_holds_wherever_the_image_stands(tiny_graphs, build, before, after):
    keep = kept_by(tiny_graphs, "cls", 0.3, onnx=False)
    check_oracle(tiny_graphs, build(tiny_graphs), keep, before=before, after=after)


@pytest.mark.parametrize("build", [in_torch, in_onnx])
def test_oracle_holds_for_two_images(tiny_graphs, build):
    decode, tokens = build(tiny_graphs), random_ids(50, seed=1).tolist()
    image_rows = visual_features(tiny_graphs)
    text = embed(tiny_graphs.reference(), random_ids(9)[None])[0]
    full = np.concatenate([text[:3], image_rows, text[3:5], image_rows[::-1], text[5:]])[None]
    spans = [
        VisualSpan(start=start, num_visual_tokens=NUM_VISUAL, keep_indices=np.array(keep))
        for start, keep in ((3, [0, 7, 8]), (21, [2, 15]))
    ]
    table = build_kept_positions(unpruned_length=full.shape[1], spans=spans)
    truth = run_masked(tiny_graphs.reference(), decode, full, table, tokens)
    ones = np.ones((1, len(table)), dtype=np.int64)
    gap = run(tiny_graphs.reference(), decode, full[:, table], ones, table[None], tokens)
    assert np.abs(gap - truth).max() <= ATOL


@pytest.mark.parametrize("build", [in_torch, in_onnx])
def test_left_padded_rows_equal_the_rows_alone(tiny_graphs, build):
    decode, tokens = build(tiny_graphs), random_ids(8, seed=1).tolist()
    rows, tables = [], []
    for before, after, keep in ((5, 4, [0, 6, 15]), (2, 9, [3]), (7, 1, list(range(16)))):
        full = unpruned_prompt(tiny_graphs, before, after)
        span = VisualSpan(start=before, num_visual_tokens=16, keep_indices=np.array(keep))
        tables.append(build_kept_positions(unpruned_length=full.shape[1], spans=[span]))
        rows.append(full[0, tables[-1]])
    longest = max(map(len, rows))
    embeds = np.zeros((len(rows), longest, rows[0].shape[1]), dtype=np.float32)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        embeds[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    batch = run(tiny_graphs.reference(), decode, embeds, mask, stack_tables(tables), tokens)
    for index, (row, table) in enumerate(zip(rows, tables, strict=True)):
        ones = np.ones((1, len(row)), dtype=np.int64)
        alone = run(tiny_graphs.reference(), decode, row[None], ones, table[None], tokens)
        assert np.abs(batch[:, index] - alone[:, 0]).max() <= ATOL


def test_keep_all_with_gap_equals_the_graph_without_the_node_bit_for_bit(tiny_graphs):
    full = unpruned_prompt(tiny_graphs, 5, 4)
    ones, tokens = np.ones((1, full.shape[1]), dtype=np.int64), random_ids(20, seed=1).tolist()
    table = compact_positions(full.shape[1])[None]
    with_node = run(tiny_graphs.reference(), in_onnx(tiny_graphs), full, ones, table, tokens)
    without = run(
        tiny_graphs.reference(), in_onnx(tiny_graphs, bare=True), full, ones, table, tokens
    )
    assert np.array_equal(with_node, without)


def test_onnx_decoder_equals_pytorch_through_decode(tiny_graphs):
    full = unpruned_prompt(tiny_graphs, 5, 4)
    keep = kept_by(tiny_graphs, "text", 0.3, onnx=False)
    span = VisualSpan(start=5, num_visual_tokens=16, keep_indices=keep)
    table = build_kept_positions(unpruned_length=full.shape[1], spans=[span])
    ones, tokens = np.ones((1, len(table)), dtype=np.int64), random_ids(20, seed=1).tolist()
    both = [
        run(tiny_graphs.reference(), build(tiny_graphs), full[:, table], ones, table[None], tokens)
        for build in (in_torch, in_onnx)
    ]
    assert np.abs(both[0] - both[1]).max() <= ATOL
