"""The exact oracle, for any family: pruned with original ids = unpruned with dropped tokens hidden.

Logits of a GAP-pruned run equal those of the *unpruned* run in which no query may attend to a
dropped visual token. It needs no trained weights, and compact positions break it.

    full = spliced(reference, features, before=5, after=4)
    table = build_kept_positions(unpruned_length=full.shape[1], spans=[VisualSpan(...)])
    check_masked_oracle(reference, torch_decoder(reference), full, table)

Shape letters: B rows, L prompt tokens before pruning, P after, S fed tokens, T slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gap_export.families import Reference
from gap_export.runtime.backends.backend import Backend
from gap_export.spec.positions import compact_positions, gap_remap, slots_from_mask

ATOL = 1e-4
# How far compact positions must be off, in logits of size O(1).
VIOLATION = 1e-2
DECODE_STEPS = 50

# (embeds [B,S,H], mask [B,T], slots [B,S], table [B,P], past) -> (logits [B,V], present)
Decoder = Callable[..., tuple[np.ndarray, list[np.ndarray]]]


def torch_decoder(reference: Reference) -> Decoder:
    """The reference's own decoder, ids remapped in numpy."""

    def decode(embeds, mask, slots, table, past):
        ids = gap_remap(slots, table)
        with torch.inference_mode():
            logits, *present = reference.decoder(*map(torch.from_numpy, (embeds, mask, ids, *past)))
        return logits.numpy()[:, 0], [p.numpy() for p in present]

    return decode


def onnx_decoder(session: Any) -> Decoder:
    """A graph in ONNX Runtime; one without ``kept_positions`` sees slots as ids."""
    names = [i.name for i in session.get_inputs()]
    caches = [name for name in names if name.startswith("past")]

    def decode(embeds, mask, slots, table, past):
        feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": slots}
        if "kept_positions" in names:
            feed["kept_positions"] = table
        logits, *present = session.run(None, feed | dict(zip(caches, past, strict=True)))
        return logits[:, 0], present

    return decode


def backend_decoder(backend: Backend) -> Decoder:
    """A bundle's decoder in any backend; its cache goes along as what is past."""

    def decode(embeds, mask, slots, table, past):
        (cache,) = past if len(past) == 1 else [backend.new_cache(len(embeds), 1024)]
        feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": slots}
        return backend.decode(feed | {"kept_positions": table}, cache), [cache]

    return decode


def random_ids(length: int, *, seed: int = 0) -> np.ndarray:
    """Ids of plain words."""
    return np.random.default_rng(seed).integers(5, 60, size=length)


def embed(reference: Reference, ids: np.ndarray) -> np.ndarray:
    """int64 [B, T] to float32 [B, T, H]."""
    with torch.inference_mode():
        return reference.embed_tokens(torch.from_numpy(ids)).numpy()


def spliced(reference: Reference, visual: np.ndarray, *, before: int, after: int) -> np.ndarray:
    """Text, all visual tokens [N, H], text: [1, L, H]."""
    text = embed(reference, random_ids(before + after)[None])[0]
    return np.concatenate([text[:before], visual, text[before:]])[None]


def run(
    reference: Reference,
    decode: Decoder,
    embeds: np.ndarray,
    mask: np.ndarray,
    table: np.ndarray,
    tokens: Sequence[int],
) -> np.ndarray:
    """Prefill, then one step for each forced token; logits [steps + 1, B, V]."""
    batch = embeds.shape[0]
    slots = slots_from_mask(mask)
    logits, past = decode(embeds, mask, slots, table, _no_past(reference, batch))
    every = [logits]
    for token in tokens:
        mask = np.concatenate([mask, np.ones((batch, 1), dtype=np.int64)], axis=1)
        slots = slots[:, -1:] + 1
        step = embed(reference, np.full((batch, 1), token))
        logits, past = decode(step, mask, slots, table, past)
        every.append(logits)
    return np.stack(every)


def run_masked(
    reference: Reference,
    decode: Decoder,
    full: np.ndarray,
    table: np.ndarray,
    tokens: Sequence[int],
) -> np.ndarray:
    """All tokens fed at slots 0..L-1 with ids 0..L-1; those outside ``table`` hidden from all."""
    length = full.shape[1]
    mask = np.zeros((1, length), dtype=np.int64)
    mask[:, table] = 1
    identity = compact_positions(length)[None]
    # A hidden token still takes a slot, so slots cannot come from the mask here.
    logits, past = decode(full, mask, identity, identity, _no_past(reference, 1))
    every = [logits]
    for step, token in enumerate(tokens):
        mask = np.concatenate([mask, np.ones((1, 1), dtype=np.int64)], axis=1)
        fed = embed(reference, np.array([[token]]))
        logits, past = decode(fed, mask, np.array([[length + step]]), identity, past)
        every.append(logits)
    return np.stack(every)


def check_masked_oracle(
    reference: Reference,
    decode: Decoder,
    full: np.ndarray,
    table: np.ndarray,
    *,
    steps: int = DECODE_STEPS,
) -> None:
    """Assert the oracle for original ids, and that compact ids violate it at every step.

    Args:
        reference: Float32, whatever its pruning: its embedding and sizes are used.
        decode: From :func:`torch_decoder` or :func:`onnx_decoder`.
        full: float32 [1, L, H], the unpruned prompt's vectors.
        table: int64 [P], kept positions.
        steps: Decode steps with forced tokens, after the prefill.
    """
    tokens = random_ids(steps, seed=1).tolist()
    truth = run_masked(reference, decode, full, table, tokens)
    # Two rows of one batch: the same tokens, with their own ids and re-numbered.
    pruned = np.repeat(full[:, table], 2, axis=0)
    tables = np.stack([table, compact_positions(len(table))])
    both = run(reference, decode, pruned, np.ones(tables.shape, dtype=np.int64), tables, tokens)
    gap, compact = both[:, :1], both[:, 1:]
    assert np.abs(truth).max() > 0.5
    assert np.abs(gap - truth).max() <= ATOL
    if len(table) < full.shape[1]:
        off = np.abs(compact - truth).max(axis=(1, 2))
        assert off.min() > VIOLATION
    else:
        assert np.abs(compact - gap).max() <= ATOL


def _no_past(reference: Reference, batch: int) -> list[np.ndarray]:
    spec = reference.decoder_spec
    empty = np.zeros((batch, spec.num_key_value_heads, 0, spec.head_dim), dtype=np.float32)
    return [empty] * (2 * spec.num_layers)


def logits_of_every_token(reference: Reference, full: np.ndarray) -> np.ndarray:
    """[L, V] for one prompt [1, L, H]: a prefill for each prefix, since one gives its last only."""
    decode, every = torch_decoder(reference), []
    for length in range(1, full.shape[1] + 1):
        slots = compact_positions(length)[None]
        mask = np.ones_like(slots)
        past = _no_past(reference, 1)
        every.append(decode(full[:, :length], mask, slots, slots, past)[0][0])
    return np.stack(every)
