"""The language model's tokenizer as one tokenizer.json, with the ids that a recipe counts on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gap_export.checkpoint.tokenizers.byte_level_bpe import (
    MERGES_FILE,
    VOCABULARY_FILE,
    convert_byte_level_bpe,
)
from gap_export.checkpoint.tokenizers.sentencepiece import convert_sentencepiece
from gap_export.checkpoint.weights import read_json_object
from gap_export.errors import CheckpointError
from gap_export.spec.recipe import Recipe

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
_ADDED_FILE = "added_tokens.json"
# The package holds ids in 32 bits.
_MAX_ID = 2**31 - 1


def has_tokenizer(folder: Path) -> bool:
    """Whether :func:`read_tokenizer` has something to read there."""
    return any(
        (folder / name).is_file() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE, MERGES_FILE)
    )


def read_tokenizer(folder: Path, recipe: Recipe) -> Path | bytes:
    """A tokenizer that has each special token of the recipe, under the id the recipe says.

    ``tokenizer.json`` is taken where there is one, else ``tokenizer.model``, or ``vocab.json`` with
    ``merges.txt``, is converted; the tokens of ``added_tokens.json`` and of the recipe that it
    lacks are added at its end, and no text is cut or padded, though training may have left
    ``tokenizer.json`` to do so. Text is split at special tokens before anything else is done with
    it, and each piece is tokenized like a text of its own, with a space in front where the model's
    tokenizer puts one.

    Args:
        folder: Holds the files.
        recipe: Names special tokens.

    Returns:
        The folder's tokenizer.json where it will do as it is, else the content of one.

    Raises:
        CheckpointError: there is none, it is damaged, or a token has another id than it must.
        MissingDependencyError: a package that reads ``tokenizer.model`` is not installed.
    """
    whole, sentencepiece = folder / TOKENIZER_FILE, folder / SENTENCEPIECE_FILE
    merges, wanted = folder / MERGES_FILE, _wanted(folder, recipe)
    if whole.is_file():
        source, plain = whole, read_json_object(whole)
    elif sentencepiece.is_file():
        source, plain = sentencepiece, convert_sentencepiece(sentencepiece)
    elif merges.is_file():
        source, plain = merges, convert_byte_level_bpe(folder, wanted)
    else:
        raise CheckpointError(
            "the tokenizer was not found",
            seen=whole,
            allowed=f"{TOKENIZER_FILE} or {SENTENCEPIECE_FILE}, or {VOCABULARY_FILE} with "
            f"{MERGES_FILE}",
            fix="copy the tokenizer of the language model there",
        )
    before = json.dumps(plain)
    for key in ("truncation", "padding"):
        if plain.get(key) is not None:
            plain[key] = None
    _check_ids(plain, _load(plain, source), source)
    _add_tokens(plain, wanted, source)
    _split_at_special_tokens(plain, recipe)
    _check_ids(plain, _load(plain, source), source)
    after = json.dumps(plain)
    return whole if source == whole and after == before else after.encode()


def _wanted(folder: Path, recipe: Recipe) -> dict[str, int]:
    """Ids of the tokens that must be there, by their text."""
    file = folder / _ADDED_FILE
    added = read_json_object(file) if file.is_file() else {}
    for text, token in added.items():
        if type(token) is not int or not 0 <= token <= _MAX_ID or not text:
            raise _refused(file, f"{text!r}: {token!r}"[:200], f"an id for each text, 0..{_MAX_ID}")
        if recipe.special_tokens.get(text, token) != token:
            raise _refused(
                file,
                f"{text} is {token}",
                f"{recipe.special_tokens[text]}, as recipe {recipe.name} says",
            )
    return {**added, **recipe.special_tokens}


def _add_tokens(plain: dict[str, Any], wanted: Mapping[str, int], source: Path) -> None:
    """Append what is lacking, in place."""
    tokenizer = _load(plain, source)
    added = plain.setdefault("added_tokens", [])
    free = tokenizer.get_vocab_size(with_added_tokens=True)
    for text, token in sorted(wanted.items(), key=lambda item: item[1]):
        known = tokenizer.token_to_id(text)
        if known is not None:
            if known != token:
                raise _refused(source, f"{text} is token {known}", f"token {token}")
            continue
        if token != free:
            taken = tokenizer.id_to_token(token)
            what = f"token {token} is {taken!r}" if taken is not None else f"{free} tokens"
            raise _refused(source, what, f"{text} as token {token}")
        # The spaces around it belong to it: slow tokenizers stripped them at tokens added later.
        strips = {"single_word": False, "lstrip": True, "rstrip": True}
        added.append({"id": token, "content": text, **strips, "normalized": False, "special": True})
        free += 1


def _split_at_special_tokens(plain: dict[str, Any], recipe: Recipe) -> None:
    """Make special tokens stand alone in any text, and pieces of text alike, in place."""
    for entry in plain.get("added_tokens", ()):
        # Matched after normalization, "<s>[" would be neither the token nor a "[" that begins a
        # text: the space in front of all normalized text would have to be there.
        if entry["content"] in recipe.special_tokens:
            entry.update(normalized=False, special=True)
    splitter = plain.get("pre_tokenizer")
    # Newer conversions put a space before the first piece alone.
    if isinstance(splitter, dict) and splitter.get("prepend_scheme") == "first":
        splitter["prepend_scheme"] = "always"


def _check_ids(plain: dict[str, Any], tokenizer: Tokenizer, source: Path) -> None:
    """See that added tokens have the ids they are listed with: the parser renumbers in silence."""
    for entry in plain.get("added_tokens", ()):
        seen = tokenizer.token_to_id(entry["content"])
        if seen != entry["id"]:
            raise _refused(
                source, f"{entry['content']} listed as token {entry['id']}", f"token {seen}"
            )


def _load(plain: dict[str, Any], source: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(plain))
    except BaseException as err:
        # The tokenizers package raises bare Exception, and where it panics something that is no
        # Exception, of a module that cannot be imported: nothing narrower would catch either.
        if type(err) is not Exception and type(err).__name__ != "PanicException":
            raise
        raise _refused(source, str(err)[:200], "what the tokenizers package reads") from err


def _refused(source: Path, seen: str, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"{source} does not fit",
        seen=seen,
        allowed=allowed,
        fix="use the tokenizer that the model was trained with",
    )
