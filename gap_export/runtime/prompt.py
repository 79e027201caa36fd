"""From an expression to token ids, refusing what would change the prompt's structure."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gap_export.errors import BundleError, ExpressionError
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import Int64Array, num_image_ids

TOKENIZER_FILE = "tokenizer.json"
_SLOT = "{expression}"
# Said of an expression, and by an export of a canvas that leaves no room for any.
NO_ROOM = "the expression does not fit the model's context"
# Unicode's controls, formats, line ends, surrogates and private characters: nothing one can see.
_UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs", "Co"})
# The two joiners shape letters of several scripts, and emoji.
_JOINERS = frozenset("\u200c\u200d")
# Far above any real token's length: keeps a novel from being tokenized only to be refused.
_MAX_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, kw_only=True)
class EncodedExpression:
    """One expression in its prompt.

    Attributes:
        expression: As it was given.
        prefix_ids: int64 [s], tokens before the image, beginning-of-sequence included.
        suffix_ids: int64 [t], tokens after the image.
        text_ids: int64 [T'] each, for the pruner: one text, or the segments of a long one;
            empty where the pruner reads no text.
        warnings: What the user should know, e.g. words the tokenizer does not.
    """

    expression: str
    prefix_ids: Int64Array
    suffix_ids: Int64Array
    text_ids: tuple[Int64Array, ...]
    warnings: tuple[str, ...]


class PromptEncoder:
    """Turns expressions into ids, and ids back into text, for one bundle.

    Attributes:
        image_token_id: What the tokenizer makes of the image token; None where the texts before and
            after the image are tokenized one by one, so that it never sees it.
    """

    def __init__(self, manifest: Manifest, assets_folder: Path) -> None:
        """Load the tokenizers.

        Raises:
            BundleError: a tokenizer cannot be read, or does not know the image token where it must.
        """
        self._manifest = manifest
        self._tokenizer = _load_tokenizer(assets_folder / TOKENIZER_FILE)
        self._has_digit: dict[int, bool] = {}
        self._unknown_id = _unknown_id(self._tokenizer)
        self._special = _special_tokens(self._tokenizer) | {manifest.prompt.image_token}
        self._text_tokenizer: Tokenizer | None = None
        if manifest.text_encoder is not None:
            self._text_tokenizer = _load_tokenizer(
                assets_folder / manifest.text_encoder.tokenizer_file
            )
            self._special |= _special_tokens(self._text_tokenizer)
        self.image_token_id: int | None = None
        if manifest.prompt.tokenization == "whole":
            self.image_token_id = self._tokenizer.token_to_id(manifest.prompt.image_token)
            if self.image_token_id is None:
                raise BundleError(
                    "the tokenizer does not know the image token",
                    seen=manifest.prompt.image_token,
                    fix="the bundle does not hold together; export it again",
                )

    def encode(self, expression: str) -> EncodedExpression:
        """Ids of the prompt around the image.

        Args:
            expression: What to look for, e.g. "the red cup on the left". Space around it does
                not count.

        Raises:
            ExpressionError: not text, empty, too long, with characters that cannot be seen, with
                words the tokenizer has no token for, or holding one of its special tokens.
        """
        text = self._check_text(expression)
        spec = self._manifest.prompt
        encoding = _tokenize(self._tokenizer, text, add_special_tokens=False)
        if len(encoding.ids) > spec.max_expression_tokens:
            raise ExpressionError(
                "the expression is too long",
                seen=f"{len(encoding.ids)} tokens",
                allowed=f"at most {spec.max_expression_tokens} tokens",
                fix="describe the object in fewer words",
            )
        prefix, suffix = (
            self._split_ids(text)
            if self.image_token_id is not None
            else self._tokenize_segments(text)
        )
        words = [
            text[start:end]
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token == self._unknown_id
        ]
        unknown = f"words the model does not know: {', '.join(dict.fromkeys(words))}"
        warnings = (unknown,) if words else ()
        encoded = EncodedExpression(
            expression=expression,
            prefix_ids=np.asarray(prefix, dtype=np.int64),
            suffix_ids=np.asarray(suffix, dtype=np.int64),
            text_ids=self._encode_for_pruner(text),
            warnings=warnings,
        )
        grid = self._manifest.grid
        # Which canvas an image takes is not known here: the longest is safe.
        image_ids = max(
            num_image_ids(
                grid.num_visual_tokens, one, position_axes=self._manifest.decoder.position_axes
            )
            for one in self._manifest.image.grids or ((grid.rows, grid.cols),)
        )
        self.check_context(encoded, image_ids)
        return encoded

    def check_context(self, encoded: EncodedExpression, num_image_ids: int) -> None:
        """See that the position ids of prompt and answer fit the model's context.

        Kept tokens keep their ids, so those of the unpruned image count. :meth:`encode` has done
        this for an image that is not cut into tiles.

        Raises:
            ExpressionError: they do not fit.
        """
        spec, limit = self._manifest.prompt, self._manifest.decoder.max_position_embeddings
        num_ids = len(encoded.prefix_ids) + num_image_ids + len(encoded.suffix_ids)
        if num_ids + spec.max_new_tokens > limit:
            raise ExpressionError(
                NO_ROOM,
                seen=f"{num_ids} position ids of the prompt (those of pruned tokens included) "
                f"and {spec.max_new_tokens} for the answer",
                allowed=f"{limit} in all",
                fix="describe the object in fewer words",
            )

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """Text of an answer, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def has_digit(self, token_id: int) -> bool:
        """Whether a token's text holds a digit."""
        known = self._has_digit.get(token_id)
        if known is None:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            known = self._has_digit[token_id] = any(c.isdigit() for c in text)
        return known

    def pieces(self) -> dict[int, str]:
        """Text of every token as it stands behind another one; special ones leave none."""
        ids = sorted(self._tokenizer.get_vocab().values())
        # Behind a word, so that a space in front of the token shows.
        before = self._tokenizer.encode("0", add_special_tokens=False).ids
        start = self._tokenizer.decode(before, skip_special_tokens=True)
        texts = self._tokenizer.decode_batch(
            [[*before, token] for token in ids], skip_special_tokens=True
        )
        return {
            token: text[len(start) :] if text.startswith(start) else text
            for token, text in zip(ids, texts, strict=True)
        }

    def _check_text(self, expression: str) -> str:
        if not isinstance(expression, str):
            raise ExpressionError(
                "the expression is not text", seen=type(expression).__name__, allowed="a string"
            )
        text = expression.strip()
        if all(c.isspace() or c in _JOINERS or unicodedata.category(c) in _UNSEEN for c in text):
            raise ExpressionError(
                "the expression is empty",
                seen=repr(expression[:40]),
                allowed='words for one object, e.g. "the red cup on the left"',
            )
        limit = self._manifest.prompt.max_expression_tokens * _MAX_CHARACTERS_PER_TOKEN
        if len(text) > limit:
            raise ExpressionError(
                "the expression is too long",
                seen=f"{len(text)} characters",
                allowed=f"at most {self._manifest.prompt.max_expression_tokens} tokens",
                fix="describe the object in fewer words",
            )
        for character in text:
            if character not in _JOINERS and unicodedata.category(character) in _UNSEEN:
                raise ExpressionError(
                    "the expression holds a control character or one that cannot be seen",
                    seen=f"U+{ord(character):04X}",
                    allowed="one line of plain text",
                )
        for token in sorted(self._special):
            if token in text:
                raise ExpressionError(
                    "the expression holds a special token of the model",
                    seen=token,
                    allowed=f"plain words, without {', '.join(sorted(self._special))}",
                    fix="leave it out",
                )
        return text

    def _split_ids(self, text: str) -> tuple[list[int], list[int]]:
        """Ids before and after the image, of the template tokenized in one go."""
        spec = self._manifest.prompt
        ids = _tokenize(self._tokenizer, spec.template.replace(_SLOT, text)).ids
        places = [place for place, token in enumerate(ids) if token == self.image_token_id]
        if len(places) != 1 or places[0] + 1 == len(ids):
            raise _no_place_for_image(spec.template, len(places))
        return ids[: places[0]], ids[places[0] + 1 :]

    def _tokenize_segments(self, text: str) -> tuple[list[int], list[int]]:
        """Ids before and after the image, each text tokenized on its own."""
        spec = self._manifest.prompt
        # Split first, so that nothing in the expression can move the image.
        before, *after = spec.template.split(spec.image_token)
        if len(after) != 1 or not after[0]:
            raise _no_place_for_image(spec.template, len(after))
        before, behind = (part.replace(_SLOT, text) for part in (before, after[0]))
        prefix: list[int] = _tokenize(self._tokenizer, before).ids
        bare = _tokenize(self._tokenizer, before, add_special_tokens=False).ids
        if bare != prefix[len(prefix) - len(bare) :]:
            raise BundleError(
                "the tokenizer ends every text with a special token, so none can go on",
                seen=prefix[-1],
                allowed="special tokens at the start alone",
                fix="the bundle does not hold together; export it again",
            )
        return prefix, _tokenize(self._tokenizer, behind, add_special_tokens=False).ids

    def _encode_for_pruner(self, text: str) -> tuple[Int64Array, ...]:
        spec = self._manifest.text_encoder
        if spec is None or self._text_tokenizer is None:
            return ()
        most = spec.max_tokens
        # A tower was trained on whole texts; of bare words the special ones mean nothing.
        whole = spec.component == "text_encoder"
        text = spec.template.replace(_SLOT, text)
        ids = _tokenize(self._text_tokenizer, text, add_special_tokens=whole).ids
        if len(ids) > most and spec.long_texts == "cut":
            # The last token is the end of text, which the tower reads its answer from.
            ids = [*ids[: most - 1], ids[-1]]
        text_ids = np.asarray(ids, dtype=np.int64)
        return tuple(text_ids[start : start + most] for start in range(0, len(text_ids), most))


def _no_place_for_image(template: str, times: int) -> BundleError:
    return BundleError(
        "the prompt template does not hold the image token once, before some text",
        seen=f"{times} times in {template!r}",
        fix="the bundle does not hold together; export it again",
    )


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        # A saved tokenizer may still be set to cut or to pad: a prompt is neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except (OSError, UnicodeDecodeError) as err:
        raise BundleError("the bundle's tokenizer cannot be read", seen=f"{path}: {err}") from err
    except BaseException as err:
        if not _is_of_tokenizers(err):
            raise
        raise BundleError(
            "the bundle's tokenizer is not one", seen=f"{path}: {err}", fix="export it again"
        ) from err
    return tokenizer


def _tokenize(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> Any:
    """A text's ``tokenizers.Encoding``.

    Raises:
        ExpressionError: a word that the tokenizer can neither split nor call unknown.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except BaseException as err:
        if not _is_of_tokenizers(err):
            raise
        raise ExpressionError(
            "the model's tokenizer cannot encode this text",
            seen=f"{text!r} ({err})",
            allowed="words of its vocabulary; it has no token for unknown ones",
            fix="describe the object in other words",
        ) from err


def _is_of_tokenizers(err: BaseException) -> bool:
    """Whether the tokenizers package raised it.

    That raises bare Exception and, where its Rust code panics, a class that is no Exception and
    cannot be imported.
    """
    return type(err) is Exception or type(err).__name__ == "PanicException"


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    return {token.content for token in added if token.special}


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """Id that stands for unknown words; models that spell out bytes have none."""
    model = json.loads(tokenizer.to_str())["model"]
    name = model.get("unk_token")
    if name is None or model.get("byte_fallback"):
        return None
    found: int | None = tokenizer.token_to_id(name)
    return found
