"""What pruners that read the text are fed: one embedding a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gap_export.runtime.backends.backend import TEXT, Backend, FloatArray
from gap_export.runtime.computed import check_computed
from gap_export.runtime.prompt import EncodedExpression

# As that of the pruners: a zero vector stays one.
_LEAST_NORM = 1e-8


def encode_texts(backend: Backend, encoded: Sequence[EncodedExpression]) -> FloatArray:
    """Text embeddings [B, D]; texts of one length go together, so none is ever padded.

    That of a text in several segments is the mean of their unit vectors, as CDPruner's mean of
    cosines has it.

    Raises:
        ComputationError: an embedding is not finite, or holds one number alone.
    """
    segments: list[list[FloatArray]] = [[] for _ in encoded]
    for place in range(max(len(row.text_ids) for row in encoded)):
        rows_by_length: dict[int, list[int]] = {}
        for index, row in enumerate(encoded):
            if place < len(row.text_ids):
                rows_by_length.setdefault(len(row.text_ids[place]), []).append(index)
        for rows in rows_by_length.values():
            ids = np.stack([encoded[index].text_ids[place] for index in rows])
            batch = backend.run(TEXT, {"input_ids": ids})["text_embeds"]
            check_computed(batch, graph=TEXT, output="text_embeds")
            for index, embeds in zip(rows, batch, strict=True):
                segments[index].append(embeds)
    joined: list[FloatArray] = []
    for parts in segments:
        if len(parts) == 1:
            joined.append(parts[0])
            continue
        vectors = np.stack(parts).astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        units = vectors / np.maximum(norms, _LEAST_NORM)
        joined.append(np.mean(units, axis=0).astype(parts[0].dtype))
    return np.stack(joined)
