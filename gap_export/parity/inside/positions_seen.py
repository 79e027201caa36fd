"""The position ids that RoPE really saw, read out of a decoder's graph.

Found by structure: what turns ids into angles is a Cos or a Sin, or takes rows from a table of
them. Of the graph only what makes the ids is run, and the ids do not depend on a token or on what
the cache holds, so that the prompts here are only tables of positions. What must be seen is worked
out apart from any graph, by :mod:`gap_export.spec.positions`.

Shape letters: B rows, S fed tokens, P prompt tokens after pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle import Bundle
from gap_export.errors import BundleError, GapExportError
from gap_export.graph.id_readers import find_id_readers
from gap_export.graph.onnx_file import OnnxFile
from gap_export.graph.seen_ids import IdReader
from gap_export.parity.inside.taps import run_taps
from gap_export.parity.results import PositionsRow
from gap_export.spec.manifest import GraphSpec, Manifest
from gap_export.spec.positions import (
    Int64Array,
    VisualSpan,
    build_id_table,
    build_kept_positions,
    compact_positions,
    gap_remap,
    slots_from_mask,
    stack_tables,
)

DECODER = "decoder_model_merged"
# Tokens around the image of a prompt that stands for all; two rows, so that one is padded.
_PREFIX, _SUFFIXES = 5, (7, 3)
# Kept tokens of a prompt whose ids go up to the model's last.
_FAR_LENGTHS = (12, 9)
_LOOKED_FOR = (
    "no place was found where ids become angles: a Cos or Sin of ids times frequencies, a row "
    "taken from a table of these, or a RotaryEmbedding with position_ids"
)
# numpy has no bfloat16; nothing that makes ids reads such values.
_DTYPES: Mapping[str, type[np.generic]] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": np.float16, "int64": np.int64,
}  # fmt: skip
Ids = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PositionsNotRead:
    """There is no telling which ids RoPE sees.

    Attributes:
        reason: Why, in one sentence.
    """

    reason: str


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A batch of prompts, as far as positions go.

    Attributes:
        id_table: int64 [B, P], or [A, B, P] where positions have several axes.
        attention_mask: int64 [B, P], 0 for padding on the left.
    """

    id_table: Int64Array
    attention_mask: Int64Array

    @classmethod
    def of_rows(cls, rows: Sequence[Int64Array]) -> _Prompt:
        table = stack_tables(rows)
        mask = np.zeros(table.shape[-2:], dtype=np.int64)
        for target, row in zip(mask, rows, strict=True):
            target[len(target) - row.shape[-1] :] = 1
        return cls(id_table=table, attention_mask=mask)

    @property
    def last_id(self) -> int:
        """The largest there is, but for what continues the table of a shorter row."""
        lengths = self.attention_mask.sum(axis=1)
        return max(
            int(self.id_table[..., row, :length].max()) for row, length in enumerate(lengths)
        )

    def at(self, step: int) -> tuple[Int64Array, Int64Array]:
        """Mask [B, P + step] and slots [B, S] of prefill (0) or of a decode step (1, 2, ...)."""
        rows = len(self.attention_mask)
        answered = np.ones((rows, step), dtype=np.int64)
        mask = np.concatenate([self.attention_mask, answered], axis=1)
        slots = slots_from_mask(mask)
        return mask, slots[:, -1:] if step else slots


def read_positions(
    bundle: Bundle,
    *,
    steps: Sequence[int] = (0, 1, 2, 50),
    file: str | None = None,
    tables: Sequence[Int64Array] = (),
) -> tuple[PositionsRow, ...] | PositionsNotRead:
    """Read the ids that a decoder's rotary embedding sees, and compare them with what they must be.

    Args:
        bundle: A checked one.
        steps: 0 for prefill, n for the n-th decode step, which feeds the n-th token of an answer.
        file: Which graph of the decoder, by its path in the bundle; None for the base graph.
        tables: int64 [B, P] or [A, B, P] each: ids of real prompts, none of them padded. Besides
            these there are always a padded batch in the bundle's own shape, and ids up to the last
            one the model knows.

    Returns:
        A row for each step, of the prompt and the reader that are furthest off; or, where ONNX
        Runtime does not run the part of the graph that makes the ids, why.

    Raises:
        BundleError: there is no such graph, or its file is damaged.
    """
    manifest = bundle.manifest
    graphs = {graph.file: graph for graph in manifest.graphs if graph.component == DECODER}
    spec = manifest.graph(DECODER) if file is None else graphs.get(file)
    if spec is None:
        raise BundleError(
            "the bundle has no such graph of its decoder", seen=file, allowed=", ".join(graphs)
        )
    graph = OnnxFile.read(bundle.file(spec.file))
    readers = find_id_readers(graph)
    prompts = [
        *(
            _Prompt(id_table=table, attention_mask=np.ones(table.shape[-2:], dtype=np.int64))
            for table in tables
        ),
        *_prompts(manifest, last_step=max(steps)),
    ]
    rows = []
    try:
        for step in steps:
            ends = [prompt.last_id + step for prompt in prompts]
            most = manifest.decoder.max_position_embeddings
            known = [prompt for prompt, end in zip(prompts, ends, strict=True) if end < most]
            # A model for a few tokens may know the ids of none of them.
            looked_at = known or [prompts[int(np.argmin(ends))]]
            found = [
                _look(graph, spec, readers, prompt, step, manifest.decoder.rope_axes)
                for prompt in looked_at
            ]
            # The furthest off; of several that are right the one that reaches furthest.
            _, worst = max(found, key=lambda one: (one[0], one[1].expected[1]))
            rows.append(worst)
    except GapExportError as err:
        return PositionsNotRead(reason=f"the ids inside {spec.file} cannot be read: {err}")
    return tuple(rows)


def _prompts(manifest: Manifest, *, last_step: int) -> Iterator[_Prompt]:
    """Prompts of the bundle's own shape, and prompts that go as far as ids do."""
    pruning = manifest.pruning
    if pruning.baked_positions:
        # There is one table, and text behind the image counts on from it.
        table = np.array(pruning.baked_positions, dtype=np.int64)
        texts = (table[:, -1:] + np.arange(1, suffix) for suffix in _SUFFIXES)
        rows = [np.concatenate([table, text], axis=1) for text in texts]
        yield _Prompt.of_rows([row if len(table) > 1 else row[0] for row in rows])
        return
    num_visual, num_kept = pruning.num_visual_tokens, pruning.num_emitted_tokens
    keep = np.linspace(0, num_visual - 1, num_kept).astype(np.int64)
    if pruning.order != "raster":
        keep = keep[::-1]
    grid, axes = (manifest.grid.rows, manifest.grid.cols), manifest.decoder.position_axes
    kept_of_rows = [keep] * len(_SUFFIXES)
    if axes > 1:
        # Nothing of the last row and column, where the text's ids would show what is left.
        inner = np.arange(num_visual).reshape(grid)[:-1, :-1].ravel()
        places = np.linspace(len(inner) - 1, 0, num_kept).astype(np.int64)
        kept_of_rows[-1] = np.unique(inner[places]) if len(inner) else keep
    rows = []
    for suffix, kept_of_row in zip(_SUFFIXES, kept_of_rows, strict=True):
        span = VisualSpan(
            start=_PREFIX, num_visual_tokens=num_visual, keep_indices=kept_of_row, grid=grid
        )
        length = _PREFIX + num_visual + suffix
        kept = build_kept_positions(unpruned_length=length, spans=[span])
        rows.append(
            build_id_table(
                kept,
                unpruned_length=length,
                spans=[span],
                position_axes=axes,
                rule=pruning.positions,
            )
        )
    yield _Prompt.of_rows(rows)
    for back in (last_step, 0):
        last = max(manifest.decoder.max_position_embeddings - 1 - back, 0)
        if pruning.positions == "compact":
            far = [compact_positions(last + 1)]
        else:
            # Some tokens, far apart.
            ids = (np.linspace(0, last, length).astype(np.int64) for length in _FAR_LENGTHS)
            far = [np.unique(row) for row in ids]
        yield _Prompt.of_rows([np.tile(row, (axes, 1)) if axes > 1 else row for row in far])


def _look(
    graph: OnnxFile,
    spec: GraphSpec,
    readers: Sequence[IdReader],
    prompt: _Prompt,
    step: int,
    rope_axes: Sequence[int],
) -> tuple[float, PositionsRow]:
    """One step of one prompt: by how much the reader that is furthest off is off, and its row."""
    mask, slots = prompt.at(step)
    truth = gap_remap(slots, prompt.id_table).astype(np.float64)

    def row(batch_row: int, seen: Ids | None, reason: str) -> PositionsRow:
        first, last = _ends(truth, batch_row)
        return PositionsRow(
            call=f"decode {step}" if step else "prefill",
            readers=len(readers),
            expected=(int(first), int(last)),
            seen=(np.nan, np.nan) if seen is None else _ends(seen, batch_row),
            passed=not reason,
            reason=reason,
        )

    if not readers:
        return np.inf, row(0, None, _LOOKED_FOR)
    given = {"attention_mask": mask, "position_ids": slots, "kept_positions": prompt.id_table}
    feed = _feed(spec, given, past=mask.shape[1] - slots.shape[1])
    names = list(dict.fromkeys(name for reader in readers for name in reader.values))
    values = run_taps(graph, names, feed)
    worst, found = -1.0, row(0, truth, "")
    for reader in readers:
        seen = reader.ids(values, truth.shape)
        if isinstance(seen, str):
            return np.inf, row(0, None, seen)
        if wrong := reader.wrong_choice(values, rope_axes):
            # The right ids, and not where they belong.
            return np.inf, row(0, seen, wrong)
        # What is not a number is as far off as can be.
        difference = np.nan_to_num(np.abs(seen - truth), nan=np.inf)
        off = float(difference.max())
        if off > worst:
            by_row = difference.reshape(-1, *difference.shape[-2:]).max(axis=(0, 2))
            reason = _describe(reader, seen, truth) if off else ""
            worst, found = off, row(int(by_row.argmax()), seen, reason)
    return worst, found


def _ends(ids: Ids, row: int) -> tuple[float, float]:
    return float(ids[..., row, 0].max()), float(ids[..., row, -1].max())


def _describe(reader: IdReader, seen: Ids, truth: Ids) -> str:
    wrong = seen != truth
    place = tuple(int(index) for index in np.argwhere(wrong)[0])
    axis = f"axis {place[0]}, " if len(place) > 2 else ""
    return (
        f"{reader.name} sees {seen[place]:g} instead of {truth[place]:g} ({axis}row {place[-2]}, "
        f"token {place[-1]}; {int(wrong.sum())} of {wrong.size} ids are wrong)"
    )


def _feed(
    spec: GraphSpec, given: Mapping[str, Int64Array], *, past: int
) -> dict[str, NDArray[Any]]:
    """All inputs of a decoder; embeddings and cache are zeros, since ids do not depend on them."""
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        if tensor.name in given:
            pairs = zip(tensor.shape, given[tensor.name].shape, strict=True)
            sizes.update({dim: size for dim, size in pairs if isinstance(dim, str)})
    # A decoder that holds kept_positions is not fed them.
    feed: dict[str, NDArray[Any]] = {
        name: array for name, array in given.items() if name in {one.name for one in spec.inputs}
    }
    for tensor in spec.inputs:
        if tensor.name not in given:
            # A size that no other input has is the number of slots that are filled.
            shape = [dim if isinstance(dim, int) else sizes.get(dim, past) for dim in tensor.shape]
            feed[tensor.name] = np.zeros(shape, dtype=_DTYPES[tensor.dtype])
    return feed
