"""Qwen2's tokenizer from ``vocab.json`` and ``merges.txt``, as the content of a tokenizer.json.

Checkpoints whose code uses the slow tokenizer, such as InternVL3's, come without tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gap_export.checkpoint.weights import read_json_object
from gap_export.errors import CheckpointError

VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
_CONFIG_FILE = "tokenizer_config.json"
# Which characters a text is split at is in no file: it is known by the name of the class.
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# Qwen's has 151,387 merges in 1.7 MB.
_MAX_BYTES = 16_000_000
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
# Runs of letters with what stands before them, single digits, runs of other signs, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert_byte_level_bpe(folder: Path, added: Mapping[str, int]) -> dict[str, Any]:
    """What a tokenizer.json would hold.

    Args:
        folder: Holds both files, and a tokenizer_config.json that names the tokenizer's class.
        added: Ids of tokens beside the vocabulary; ``added_tokens_decoder`` of
            tokenizer_config.json may list more, and says which are special. What is not in there
            is.

    Raises:
        CheckpointError: missing, damaged, or a tokenizer of another class.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    config = read_json_object(folder / _CONFIG_FILE)
    name = config.get("tokenizer_class")
    if name not in _CLASSES:
        raise CheckpointError(
            f"{folder / _CONFIG_FILE}: a tokenizer of a class that is not read from "
            f"{VOCABULARY_FILE} and {MERGES_FILE}",
            seen=repr(name)[:100],
            allowed=", ".join(_CLASSES),
            fix="put a tokenizer.json beside it (transformers' save_pretrained writes one)",
        )
    vocabulary = read_json_object(folder / VOCABULARY_FILE)
    ids = list(vocabulary.values())
    if {type(token) for token in ids} != {int} or sorted(ids) != list(range(len(ids))):
        raise _damaged(folder / VOCABULARY_FILE, "ids other than 0, 1, 2, ... without gaps")
    merges = _read_merges(folder / MERGES_FILE)
    try:
        tokenizer = Tokenizer(BPE(vocabulary, merges))
    except Exception as err:
        # The tokenizers package raises bare Exception, e.g. for a merge of unknown pieces.
        if type(err) is not Exception:
            raise
        raise _damaged(folder / MERGES_FILE, str(err)[:200]) from err
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    plain: dict[str, Any] = json.loads(tokenizer.to_str())
    listed = _listed(config)
    texts = {**{text: said["id"] for text, said in listed.items()}, **added}
    plain["added_tokens"] = [
        {**_FLAGS, **listed.get(text, {}), "id": token, "content": text, "normalized": False}
        for text, token in sorted(texts.items(), key=lambda item: item[1])
    ]
    return plain


def _listed(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Id of each token of ``added_tokens_decoder`` and how it is found in a text, by its text."""
    entries = config.get("added_tokens_decoder")
    return {
        said["content"]: {
            "id": int(token),
            **{name: said.get(name, default) is True for name, default in _FLAGS.items()},
        }
        for token, said in (entries.items() if isinstance(entries, Mapping) else ())
        if re.fullmatch(r"[0-9]{1,9}", token)
        and isinstance(said, Mapping)
        and isinstance(said.get("content"), str)
    }


def _read_merges(file: Path) -> list[tuple[str, str]]:
    """Pairs of pieces, the first to be joined first; a line each, behind one with the version."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        lines = raw.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError("tokenizer cannot be read", seen=f"{file}: {err}") from err
    if len(raw) > _MAX_BYTES:
        raise _damaged(file, f"more than {_MAX_BYTES} bytes")
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise _damaged(file, f"line {number}: {line[:100]!r}")
        merges.append((left, right))
    return merges


def _damaged(file: Path, seen: str) -> CheckpointError:
    return CheckpointError(
        "tokenizer is damaged or not what it should be",
        seen=f"{file}: {seen}",
        fix="download or save the checkpoint again",
    )
