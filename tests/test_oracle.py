"""The exact oracle: GAP-pruned logits are those of an unpruned run whose dropped tokens are hidden.

It needs no trained weights, and compact positions break it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.positions import (
    VisualSpan,
    build_kept_positions,
    compact_positions,
    gap_remap,
    slots_from_mask,
    stack_kept_positions,
)

PRUNERS = ("cls", "text", "random", "spatial", "fastervlm")
DECODE_STEPS = 50
ATOL = 1e-4
# How far compact positions must be off, in logits of size O(1).
VIOLATION = 1e-2
NUM_VISUAL = 16

# (embeds [B,S,H], mask [B,T], slots [B,S], table [B,P], past) -> (logits [B,V], present)
Decoder = Callable[..., tuple[np.ndarray, list[np.ndarray]]]


def torch_decoder(graphs: Any) -> Decoder:
    module = graphs.reference().decoder

    def decode(embeds, mask, slots, table, past):
        ids = gap_remap(slots, table)
        with torch.inference_mode():
            logits, *present = module(*map(torch.from_numpy, (embeds, mask, ids, *past)))
        return logits.numpy()[:, 0], [p.numpy() for p in present]

    return decode


def onnx_decoder(graphs: Any, *, bare: bool = False) -> Decoder:
    session = graphs.session("decoder_model_merged", bare=bare)
    caches = [i.name for i in session.get_inputs() if i.name.startswith("past")]

    def decode(embeds, mask, slots, table, past):
        feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": slots}
        if not bare:
            feed["kept_positions"] = table
        logits, *present = session.run(None, feed | dict(zip(caches, past, strict=True)))
        return logits[:, 0], present

    return decode


def run(
    graphs: Any,
    decode: Decoder,
    embeds: np.ndarray,
    mask: np.ndarray,
    table: np.ndarray,
    tokens: Sequence[int],
) -> np.ndarray:
    """Prefill, then one step for each forced token; logits [steps + 1, B, V]."""
    spec = graphs.reference().decoder_spec
    batch = embeds.shape[0]
    empty = np.zeros((batch, spec.num_key_value_heads, 0, spec.head_dim), dtype=np.float32)
    slots = slots_from_mask(mask)
    logits, past = decode(embeds, mask, slots, table, [empty] * (2 * spec.num_layers))
    every = [logits]
    for token in tokens:
        mask = np.concatenate([mask, np.ones((batch, 1), dtype=np.int64)], axis=1)
        slots = slots[:, -1:] + 1
        step = embed(graphs, np.full((batch, 1), token))
        logits, past = decode(step, mask, slots, table, past)
        every.append(logits)
    return np.stack(every)


def embed(graphs: Any, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return graphs.reference().embed_tokens(torch.from_numpy(ids)).numpy()


def visual_features(graphs: Any) -> np.ndarray:
    """All N projected features of one picture, [N, H]."""
    with torch.inference_mode():
        features, _ = graphs.reference("spatial", 1.0).vision_encoder(picture())
    return features.numpy()[0]


def picture() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def kept_by(graphs: Any, pruner: str, keep_ratio: float, *, onnx: bool) -> np.ndarray:
    """keep_indices [K] of the picture, by the graph or by PyTorch."""
    reference = graphs.reference(pruner, keep_ratio)
    feeds = {"pixel_values": picture()}
    if reference.text_encoder is not None:
        with torch.inference_mode():
            feeds["text_embeds"] = reference.text_encoder(torch.tensor([[1, 12, 15, 2]]))
    if onnx:
        session = graphs.session("vision_encoder", pruner, keep_ratio)
        return session.run(["keep_indices"], {k: v.numpy() for k, v in feeds.items()})[0][0]
    with torch.inference_mode():
        return reference.vision_encoder(*feeds.values())[1].numpy()[0]


def random_ids(length: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 120, size=length)


def unpruned_prompt(graphs: Any, before: int, after: int) -> np.ndarray:
    """Text, picture, text: [1, L, H]."""
    text = embed(graphs, random_ids(before + after)[None])[0]
    return np.concatenate([text[:before], visual_features(graphs), text[before:]])[None]


def check_oracle(graphs, decode, keep, *, before: int, after: int) -> None:
    tokens = random_ids(DECODE_STEPS, seed=1).tolist()
    full = unpruned_prompt(graphs, before, after)
    length = full.shape[1]
    table = build_kept_positions(
        unpruned_length=length,
        spans=[VisualSpan(start=before, num_visual_tokens=NUM_VISUAL, keep_indices=keep)],
    )
    hidden = np.zeros((1, length), dtype=np.int64)
    hidden[:, table] = 1
    # A hidden token still takes a slot, so slots cannot come from the mask here.
    truth = run_unpruned(graphs, decode, full, hidden, tokens)

    # Two rows of one batch: the same tokens, with their own ids and re-numbered.
    pruned = np.repeat(full[:, table], 2, axis=0)
    tables = np.stack([table, compact_positions(len(table))])
    both = run(graphs, decode, pruned, np.ones(tables.shape, dtype=np.int64), tables, tokens)
    gap, compact = both[:, :1], both[:, 1:]
    assert np.abs(truth).max() > 0.5
    assert np.abs(gap - truth).max() <= ATOL
    if len(keep) < NUM_VISUAL:
        off = np.abs(compact - truth).max(axis=(1, 2))
        assert off.min() > VIOLATION
    else:
        assert np.abs(compact - gap).max() <= ATOL


def run_unpruned(graphs, decode, embeds, mask, tokens) -> np.ndarray:
    """All tokens fed at slots 0..L-1 with ids 0..L-1; ``mask`` hides some from every query."""
    spec = graphs.reference().decoder_spec
    length = embeds.shape[1]
    empty = np.zeros((1, spec.num_key_value_heads, 0, spec.head_dim), dtype=np.float32)
    identity = compact_positions(length)[None]
    logits, past = decode(embeds, mask, identity, identity, [empty] * (2 * spec.num_layers))
    every = [logits]
    for step, token in enumerate(tokens):
        mask = np.concatenate([mask, np.ones((1, 1), dtype=np.int64)], axis=1)
        slots = np.array([[length + step]])
        logits, past = decode(embed(graphs, np.array([[token]])), mask, slots, identity, past)
        every.append(logits)
    return np.stack(every)


@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_oracle_holds_in_pytorch(tiny_graphs, pruner, keep_ratio):
    keep = kept_by(tiny_graphs, pruner, keep_ratio, onnx=False)
    check_oracle(tiny_graphs, torch_decoder(tiny_graphs), keep, before=5, after=4)


@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_oracle_holds_in_onnx_graphs(tiny_graphs, pruner, keep_ratio):
    keep = kept_by(tiny_graphs, pruner, keep_ratio, onnx=True)
    check_oracle(tiny_graphs, onnx_decoder(tiny_graphs), keep, before=5, after=4)


@pytest.mark.parametrize("build", [torch_decoder, onnx_decoder])
@pytest.mark.parametrize(("before", "after"), [(0, 6), (1, 1), (20, 1), (3, 30)])
def test_oracle_holds_wherever_the_image_stands(tiny_graphs, build, before, after):
    keep = kept_by(tiny_graphs, "cls", 0.3, onnx=False)
    check_oracle(tiny_graphs, build(tiny_graphs), keep, before=before, after=after)


@pytest.mark.parametrize("build", [torch_decoder, onnx_decoder])
def test_oracle_holds_for_two_images(tiny_graphs, build):
    decode, tokens = build(tiny_graphs), random_ids(DECODE_STEPS, seed=1).tolist()
    picture_rows = visual_features(tiny_graphs)
    text = embed(tiny_graphs, random_ids(9)[None])[0]
    full = np.concatenate([text[:3], picture_rows, text[3:5], picture_rows[::-1], text[5:]])[None]
    spans = [
        VisualSpan(start=start, num_visual_tokens=NUM_VISUAL, keep_indices=np.array(keep))
        for start, keep in ((3, [0, 7, 8]), (21, [2, 15]))
    ]
    table = build_kept_positions(unpruned_length=full.shape[1], spans=spans)
    hidden = np.zeros((1, full.shape[1]), dtype=np.int64)
    hidden[:, table] = 1
    truth = run_unpruned(tiny_graphs, decode, full, hidden, tokens)
    ones = np.ones((1, len(table)), dtype=np.int64)
    gap = run(tiny_graphs, decode, full[:, table], ones, table[None], tokens)
    assert np.abs(gap - truth).max() <= ATOL


@pytest.mark.parametrize("build", [torch_decoder, onnx_decoder])
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
    batch = run(tiny_graphs, decode, embeds, mask, stack_kept_positions(tables), tokens)
    for index, (row, table) in enumerate(zip(rows, tables, strict=True)):
        ones = np.ones((1, len(row)), dtype=np.int64)
        alone = run(tiny_graphs, decode, row[None], ones, table[None], tokens)
        assert np.abs(batch[:, index] - alone[:, 0]).max() <= ATOL


def test_keep_all_with_gap_equals_the_graph_without_the_node_bit_for_bit(tiny_graphs):
    full = unpruned_prompt(tiny_graphs, 5, 4)
    ones, tokens = np.ones((1, full.shape[1]), dtype=np.int64), random_ids(20, seed=1).tolist()
    table = compact_positions(full.shape[1])[None]
    with_node = run(tiny_graphs, onnx_decoder(tiny_graphs), full, ones, table, tokens)
    without = run(tiny_graphs, onnx_decoder(tiny_graphs, bare=True), full, ones, table, tokens)
    assert np.array_equal(with_node, without)


def test_onnx_decoder_equals_pytorch_through_decode(tiny_graphs):
    full = unpruned_prompt(tiny_graphs, 5, 4)
    keep = kept_by(tiny_graphs, "text", 0.3, onnx=False)
    span = VisualSpan(start=5, num_visual_tokens=16, keep_indices=keep)
    table = build_kept_positions(unpruned_length=full.shape[1], spans=[span])
    ones, tokens = np.ones((1, len(table)), dtype=np.int64), random_ids(20, seed=1).tolist()
    both = [
        run(tiny_graphs, build(tiny_graphs), full[:, table], ones, table[None], tokens)
        for build in (torch_decoder, onnx_decoder)
    ]
    assert np.abs(both[0] - both[1]).max() <= ATOL
