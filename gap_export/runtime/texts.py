"""What pruners that read the text are fed: one embedding a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gap_export.runtime.backends.backend import TEXT, Backend, FloatArray
from gap_export.runtime.computed import check_computed
from gap_export.runtime.generation import embed_tokens
from gap_export.runtime.prompt import EncodedExpression
from gap_export.spec.manifest import Manifest

# As that of the pruners: a zero vector stays one.
_LEAST_NORM = 1e-8


def encode_texts(
    backend: Backend, encoded: Sequence[EncodedExpression], manifest: Manifest
) -> FloatArray:
    """What the vision encoder is fed of the texts, [B, D]; ``manifest`` says by which graph.

    Raises:
        ComputationError: an embedding is not finite, or holds one number alone.
    """
    reader = manifest.text_encoder
    assert reader is not None, "the pruner reads the text"
    if reader.component == TEXT:
        return _encode_by_tower(backend, encoded)
    width = manifest.decoder.hidden_size
    return np.stack([_pool_words(backend, row, width) for row in encoded])


def _pool_words(backend: Backend, row: EncodedExpression, width: int) -> FloatArray:
    """Mean of the unit vectors of a text's words, as the decoder reads them: [H].

    That of OpenVINO GenAI's CDPruner, which takes the mean of the cosines. What rides behind the
    first H numbers of an embedding belongs to visual tokens.
    """
    (words,) = embed_tokens(backend, np.concatenate(row.text_ids)[None])
    return _mean_of_units(words[:, :width])


def _encode_by_tower(backend: Backend, encoded: Sequence[EncodedExpression]) -> FloatArray:
    """Texts of one length go together, so none is ever padded.

    That of a text in several segments is the mean of their unit vectors, as CDPruner's mean of
    cosines has it.
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
    return np.stack(
        [parts[0] if len(parts) == 1 else _mean_of_units(np.stack(parts)) for parts in segments]
    )


def _mean_of_units(vectors: FloatArray) -> FloatArray:
    """[T, D] to [D], in the dtype that came."""
    precise = vectors.astype(np.float64)
    norms = np.linalg.norm(precise, axis=1, keepdims=True)
    units = precise / np.maximum(norms, _LEAST_NORM)
    mean: FloatArray = np.mean(units, axis=0).astype(vectors.dtype)
    return mean
