"""SentencePiece models (``tokenizer.model``) of the Llama line, as the content of a tokenizer.json.

All that is read is the model's vocabulary; the ``sentencepiece`` package is not needed.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

from gap_export.errors import CheckpointError, MissingDependencyError

# Llama's takes half a megabyte, one of 256,000 pieces four; the longest pieces are 16 characters.
# Looking for joins takes the square of a piece's length; Llama has 60,000 of them.
_MAX_BYTES = 8_000_000
_MAX_PIECE = 128
_MAX_MERGES = 1_000_000
_SPACE = "\u2581"
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_KINDS = {_NORMAL: "normal", _UNKNOWN: "unknown", _CONTROL: "control", _BYTE: "byte"}


def convert_sentencepiece(file: Path) -> dict[str, Any]:
    """What a tokenizer.json would hold.

    The tokenizer behaves as the sentencepiece package in transformers' ``legacy`` mode: every
    text, and every piece of text between special tokens, gets a space in front. The models were
    trained so. Encoding a text as a sequence puts the beginning-of-sequence token first.

    Args:
        file: A BPE model that spells unknown characters as bytes.

    Raises:
        CheckpointError: missing, damaged, or a model of another kind.
        MissingDependencyError: protobuf is not installed.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    model = _parse(file)
    _check_kind(model, file)
    pieces = [piece.piece for piece in model.pieces]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    unknown, begin = pieces[model.trainer_spec.unk_id], pieces[model.trainer_spec.bos_id]
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            _merges(model, vocabulary, file),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    special = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in special])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, model.trainer_spec.bos_id)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    plain: dict[str, Any] = json.loads(tokenizer.to_str())
    return plain


def _parse(file: Path) -> Any:
    """The ``ModelProto`` in a file."""
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from transformers.convert_slow_tokenizer import import_protobuf

        schema = import_protobuf()  # type: ignore[no-untyped-call]
    except ImportError as err:
        raise MissingDependencyError(
            "reading tokenizer.model needs a package that is not installed",
            seen="protobuf",
            fix="install it with: pip install protobuf, or put a tokenizer.json beside it",
        ) from err
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except OSError as err:
        raise CheckpointError("tokenizer cannot be read", seen=f"{file}: {err}") from err
    if len(raw) > _MAX_BYTES:
        raise _damaged(file, f"more than {_MAX_BYTES} bytes")
    model = schema.ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError as err:
        raise _damaged(file, str(err)) from err
    if not model.pieces:
        raise _damaged(file, "no pieces")
    return model


def _check_kind(model: Any, file: Path) -> None:
    """Refuse what Llama's tokenizer is not, and what would be lost on the way."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    num = len(model.pieces)
    facts = {
        "model_type is not BPE": trainer.model_type != _BPE,
        "no byte_fallback": not trainer.byte_fallback,
        "no add_dummy_prefix": not normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "escape_whitespaces is off": not normalizer.escape_whitespaces,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "a table of character rules": bool(normalizer.precompiled_charsmap),
        f"pieces of other types than {', '.join(_KINDS.values())}": not kinds <= set(_KINDS),
        f"a piece of more than {_MAX_PIECE} characters": any(
            len(piece.piece) > _MAX_PIECE for piece in model.pieces
        ),
        "a score that is not a number": any(math.isnan(piece.score) for piece in model.pieces),
        "a piece that occurs twice": len({piece.piece for piece in model.pieces}) != num,
        "no beginning-of-sequence or unknown token": not (
            0 <= trainer.bos_id < num and 0 <= trainer.unk_id < num
        ),
    }
    odd = [what for what, holds in facts.items() if holds]
    if odd:
        raise CheckpointError(
            "a SentencePiece model of a kind that is not supported",
            seen=f"{file}: {', '.join(odd)}",
            allowed="BPE with byte fallback and plain text, as in Llama and Mistral",
            fix="put a tokenizer.json beside it (transformers' save_pretrained writes one)",
        )


def _merges(model: Any, vocabulary: dict[str, int], file: Path) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best first.

    SentencePiece keeps a score per piece and joins whichever neighbors make the best one;
    a tokenizer.json wants the joins ranked. Only normal pieces are made by joining.
    """
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    ranked = sorted(normal, key=lambda piece: (-normal[piece], vocabulary[piece]))
    joins = (
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in normal and piece[cut:] in normal
    )
    merges = list(islice(joins, _MAX_MERGES + 1))
    if len(merges) > _MAX_MERGES:
        raise _damaged(file, f"more than {_MAX_MERGES} ways to join pieces")
    return merges


def _damaged(file: Path, seen: str) -> CheckpointError:
    return CheckpointError(
        "tokenizer is damaged or not what it should be",
        seen=f"{file}: {seen}",
        fix="download or save the checkpoint again",
    )
