"""The prompt as the decoder takes it, and the greedy loop; one code for every backend."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import UsageError
from gap_export.runtime.backends.backend import EMBEDDING, Backend, FloatArray, KVCache
from gap_export.runtime.box_grammar import BoxGrammar
from gap_export.runtime.computed import check_computed, choose_tokens, log_probabilities
from gap_export.spec.positions import (
    Int64Array,
    PositionRule,
    VisualSpan,
    build_id_table,
    build_kept_positions,
    gap_remap,
    slots_from_mask,
    stack_tables,
)


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row's text around its image.

    Attributes:
        prefix_embeds: [s, H], tokens before the image.
        suffix_embeds: [t, H], tokens after the image, at least one.
        image_features: [M, H], what is left of the image.
        keep_indices: int64 [M], index of each of them in the unpruned visual sequence.
        num_visual_tokens: Length of that sequence.
        grid: Its rows and columns, where it has them; see ``VisualSpan``.
        counts: int64 [M], as how many tokens each of them counts in attention; None: as one.
        shift: Added to every position id from the first visual token on; not 0 only where wrong
            positions are what is measured.
    """

    prefix_embeds: FloatArray
    suffix_embeds: FloatArray
    image_features: FloatArray
    keep_indices: Int64Array
    num_visual_tokens: int
    grid: tuple[int, int] | None = None
    counts: Int64Array | None = None
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class DecoderPrompt:
    """A batch, ready for prefill.

    Rows that are shorter than the longest are padded in front of what is theirs alone: on the left,
    or, where all begin with the same tokens, behind these. P' is P without the shared tokens.

    Attributes:
        inputs_embeds: [B, P', H], padding is zeros.
        attention_mask: int64 [B, P], 0 for padding, else as how many tokens it counts: 1, unless
            rows have ``counts``.
        position_ids: int64 [B, P'], slots.
        kept_positions: int64 [B, P], indices in the unpruned sequence.
        id_table: int64 [B, P], or [A, B, P] where positions have several axes: their ids, which is
            what the decoder's graph reads.
        shared_embeds: [1, P - P', H], tokens that all rows begin with and that go in once.
    """

    inputs_embeds: FloatArray
    attention_mask: Int64Array
    position_ids: Int64Array
    kept_positions: Int64Array
    id_table: Int64Array
    shared_embeds: FloatArray

    @property
    def num_shared(self) -> int:
        """Tokens that go in once for all rows."""
        return int(self.shared_embeds.shape[1])

    @property
    def shared_feed(self) -> dict[str, NDArray[Any]]:
        """What the decoder reads of the shared tokens, by its input names."""
        slots = np.arange(self.num_shared, dtype=np.int64)[None]
        return {
            "inputs_embeds": self.shared_embeds,
            "attention_mask": self.attention_mask[:1, : self.num_shared],
            "position_ids": slots,
            "kept_positions": self.id_table[..., :1, : self.num_shared],
        }

    @property
    def feed(self) -> dict[str, NDArray[Any]]:
        """What the decoder reads at prefill, by its input names."""
        return {
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "kept_positions": self.id_table,
        }


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the greedy loop gave.

    Attributes:
        token_ids: Per row the chosen tokens, the one that ended the answer included. Where tokens
            were forced: the tokens that would have been chosen, one per step.
        log_probabilities: Of each of those tokens, by the model's own logits, whatever a grammar
            hid; see ``computed.log_probabilities``. Empty rows where tokens were forced.
        logits: [B, steps, V] where asked for, else None.
        prefill_ms: Time to the first token.
        decode_ms: Time of all further ones.
    """

    token_ids: tuple[tuple[int, ...], ...]
    log_probabilities: tuple[tuple[float, ...], ...]
    logits: FloatArray | None
    prefill_ms: float
    decode_ms: float


def assemble_prompt(
    rows: Sequence[PromptRow],
    *,
    positions: PositionRule,
    position_axes: int = 1,
    num_shared: int = 0,
) -> DecoderPrompt:
    """Put text and image together, with the position tables.

    Args:
        rows: One per expression.
        positions: ``gap`` keeps original ids; the others are naive baselines.
        position_axes: A, of the decoder.
        num_shared: Tokens that all rows begin with and that go in once, at most those up to the
            end of the image; see ``runtime.shared_prefix``.

    Raises:
        UsageError: no rows, or keep indices that do not fit.
    """
    if not rows:
        raise UsageError("a batch needs at least one row", seen=0)
    embeds = [
        np.concatenate([row.prefix_embeds, row.image_features, row.suffix_embeds]) for row in rows
    ]
    kept, ids = zip(*(_tables(row, positions, position_axes) for row in rows), strict=True)
    length = max(len(row) for row in embeds)
    shape = (len(rows), length - num_shared, embeds[0].shape[1])
    inputs_embeds = np.zeros(shape, dtype=embeds[0].dtype)
    attention_mask = np.ones((len(rows), length), dtype=np.int64)
    for index, row_embeds in enumerate(embeds):
        padding = length - len(row_embeds)
        inputs_embeds[index, padding:] = row_embeds[num_shared:]
        attention_mask[index, num_shared : num_shared + padding] = 0
        if (counts := rows[index].counts) is not None:
            # Shared tokens, which may be visual ones, lie before the padding.
            of_row = np.ones(len(row_embeds), dtype=np.int64)
            start = len(rows[index].prefix_embeds)
            of_row[start : start + len(counts)] = counts
            attention_mask[index, attention_mask[index] != 0] = of_row
    return DecoderPrompt(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=slots_from_mask(attention_mask)[:, num_shared:],
        kept_positions=stack_tables(kept),
        id_table=stack_tables(ids),
        shared_embeds=embeds[0][None, :num_shared],
    )


def check_baked(prompt: DecoderPrompt, baked: Sequence[Sequence[int]]) -> None:
    """See that a decoder that holds a table of ids reads this prompt by the right ones.

    Args:
        prompt: From :func:`assemble_prompt`.
        baked: For each axis of positions the ids it holds; see ``PruningSpec``.

    Raises:
        UsageError: other ids belong to the prompt.
    """
    table = np.array(baked, dtype=np.int64)[:, None]
    slots = np.arange(prompt.id_table.shape[-1], dtype=np.int64)[None]
    wanted = prompt.id_table.reshape(len(baked), -1, slots.shape[1])
    wrong = (gap_remap(slots, table) != wanted).any(axis=(0, 1))
    if wrong.any():
        slot = int(wrong.argmax())
        raise UsageError(
            "this decoder holds its position ids, and the prompt has others",
            seen=f"id {wanted[0, 0, slot]} of the token in slot {slot}",
            allowed=f"{gap_remap(slots, table)[0, 0, slot]}: bundles made with --bake-positions "
            "take one form of prompt, with GAP",
            fix="use a bundle that was made without --bake-positions",
        )


def generate(
    backend: Backend,
    prompt: DecoderPrompt,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    prefix: KVCache | None = None,
    grammar: BoxGrammar | None = None,
    forced_tokens: Int64Array | None = None,
    keep_logits: bool = False,
) -> Generation:
    """Greedy decoding; ties go to the lower token id.

    Args:
        backend: Runs the decoder and the word embeddings.
        prompt: From :func:`assemble_prompt`.
        max_new_tokens: Upper bound of tokens per row.
        eos_token_ids: A row ends with any of these.
        prefix: A cache of the tokens that all rows share, where there are any; it stays as it is.
        grammar: Says which tokens may be chosen; None for any.
        forced_tokens: int64 [B, T]: feed these instead of the chosen ones, for T steps (teacher
            forcing, to compare logits step by step).
        keep_logits: Return the logits of every step.

    Raises:
        UsageError: no step to do, or forced tokens of another batch size.
        ComputationError: the decoder gave logits that choose nothing, or the word embeddings are
            not finite.
    """
    num_rows = len(prompt.inputs_embeds)
    if forced_tokens is not None and len(forced_tokens) != num_rows:
        raise UsageError(
            "forced tokens of another batch size", seen=len(forced_tokens), allowed=str(num_rows)
        )
    num_steps = max_new_tokens if forced_tokens is None else forced_tokens.shape[1]
    if num_steps < 1:
        raise UsageError("nothing to generate", seen=f"{num_steps} tokens", allowed=">= 1")

    chosen: list[Int64Array] = []
    likely: list[NDArray[np.float64]] = []
    kept_logits: list[FloatArray] = []
    empty: list[list[int]] = [[]] * num_rows
    finished = np.zeros(num_rows, dtype=bool)
    feed = prompt.feed
    length = prompt.attention_mask.shape[1]
    num_slots = length + num_steps
    cache = (
        backend.new_cache(num_rows, num_slots)
        if prefix is None
        else backend.fork_cache(prefix, num_rows, num_slots)
    )
    # Made once for all steps, each of which reads one more of the mask.
    mask = np.ones((num_rows, num_slots), dtype=np.int64)
    mask[:, :length] = prompt.attention_mask
    slots = prompt.position_ids[:, -1:].copy()
    started = first_done = time.perf_counter()
    for step in range(num_steps):
        logits = given = backend.decode(feed, cache)
        if grammar is not None:
            logits = grammar.constrain(logits, np.stack(chosen, 1).tolist() if chosen else empty)
        # With forced tokens the caller looks at the logits, also at those that choose nothing.
        tokens = (
            choose_tokens(logits, step=step)
            if forced_tokens is None
            else logits.argmax(axis=-1).astype(np.int64)
        )
        chosen.append(tokens)
        if forced_tokens is None:
            likely.append(log_probabilities(given, tokens, step=step))
        if keep_logits:
            kept_logits.append(logits)
        if step == 0:
            first_done = time.perf_counter()
        finished |= np.isin(tokens, eos_token_ids)
        if step + 1 == num_steps or (forced_tokens is None and finished.all()):
            break
        # Finished rows go on being fed their own choices, which are not read.
        fed = tokens if forced_tokens is None else forced_tokens[:, step]
        slots += 1
        feed |= {
            "inputs_embeds": embed_tokens(backend, fed[:, None], may_be_constant=True),
            "attention_mask": mask[:, : length + step + 1],
            "position_ids": slots,
        }
    ended = time.perf_counter()
    token_ids = np.stack(chosen, axis=1)
    ends = [len(chosen)] * num_rows
    if forced_tokens is None:
        # Behind its end a row only went on for the sake of the rest of the batch.
        is_last = np.isin(token_ids, eos_token_ids)
        ends = [int(row.argmax()) + 1 if row.any() else len(chosen) for row in is_last]
    by_row = np.stack(likely, axis=1) if likely else np.zeros((num_rows, 0))
    return Generation(
        token_ids=tuple(
            tuple(row[:end].tolist()) for row, end in zip(token_ids, ends, strict=True)
        ),
        log_probabilities=tuple(
            tuple(row[:end].tolist()) for row, end in zip(by_row, ends, strict=True)
        ),
        logits=np.stack(kept_logits, axis=1) if keep_logits else None,
        prefill_ms=1e3 * (first_done - started),
        decode_ms=1e3 * (ended - first_done),
    )


def embed_tokens(backend: Backend, ids: Int64Array, *, may_be_constant: bool = False) -> FloatArray:
    """Word embeddings of ids [B, T]: [B, T, H].

    Raises:
        ComputationError: they are not finite, or, unless they may be, all the same.
    """
    embeds = backend.run(EMBEDDING, {"input_ids": ids})["inputs_embeds"]
    check_computed(embeds, graph=EMBEDDING, output="inputs_embeds", may_be_constant=may_be_constant)
    return embeds


def _tables(
    row: PromptRow, positions: PositionRule, position_axes: int
) -> tuple[Int64Array, Int64Array]:
    """Indices [P] of what is fed, and its ids [P] or [A, P]."""
    start = len(row.prefix_embeds)
    span = VisualSpan(
        start=start,
        num_visual_tokens=row.num_visual_tokens,
        keep_indices=row.keep_indices,
        grid=row.grid,
    )
    unpruned_length = start + row.num_visual_tokens + len(row.suffix_embeds)
    kept = build_kept_positions(unpruned_length=unpruned_length, spans=[span])
    ids = build_id_table(
        kept,
        unpruned_length=unpruned_length,
        spans=[span],
        position_axes=position_axes,
        rule=positions,
    )
    ids[..., start:] += row.shift
    return kept, ids
