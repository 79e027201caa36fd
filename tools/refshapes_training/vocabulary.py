"""Vocabulary of the demo model: words, and an answer form in which a box is four tokens.

LLaVA answers `[0.12, 0.34, 0.56, 0.78]`. Split at white space that is `[0.12,`, `0.34,`, `0.56,`
and `0.78]`: an opening piece, two middle ones and a closing one, 101 values each.

`</s>` has the highest id on purpose. `CLIPTextModel` pools at the *largest* token id whenever
`eos_token_id == 2` (a compatibility branch in transformers), and at the first `eos_token_id`
otherwise; with the highest id both rules mean the same position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gap_export.evaluation.refshapes import IMAGE_SIZE, WORDS

NUM_BINS = 101
NUM_PLACES = 4
ANSWER_LENGTH = NUM_PLACES + 1
MAX_TEXT_TOKENS = 32

_BINS = [f"{value / 100:.2f}" for value in range(NUM_BINS)]
TOKENS: tuple[str, ...] = (
    "<pad>",
    "<s>",
    "<unk>",
    "<image>",
    "USER:",
    "ASSISTANT:",
    *WORDS,
    *(f"[{value}," for value in _BINS),
    *(f"{value}," for value in _BINS),
    *(f"{value}]" for value in _BINS),
    "</s>",
)
TOKEN_IDS: dict[str, int] = {token: i for i, token in enumerate(TOKENS)}
PAD, BOS, UNK, IMAGE = (TOKEN_IDS[t] for t in ("<pad>", "<s>", "<unk>", "<image>"))
EOS = TOKEN_IDS["</s>"]
ASSISTANT = TOKEN_IDS["ASSISTANT:"]
PREFIX: tuple[int, int] = (BOS, TOKEN_IDS["USER:"])
PLACE_OFFSETS: tuple[int, int, int, int] = (
    TOKEN_IDS["[0.00,"],
    TOKEN_IDS["0.00,"],
    TOKEN_IDS["0.00,"],
    TOKEN_IDS["0.00]"],
)
"""Id of the value 0.00 at each of the four places of an answer."""


def encode_words(text: str) -> list[int]:
    """Ids of words separated by single spaces; an unknown word is a KeyError."""
    return [TOKEN_IDS[word] for word in text.split(" ")]


def encode_for_text_tower(text: str) -> NDArray[np.int64]:
    """`<s> words </s>`, padded or cut; int64 [MAX_TEXT_TOKENS]."""
    ids = np.full(MAX_TEXT_TOKENS, PAD, np.int64)
    tokens = [BOS, *encode_words(text)[: MAX_TEXT_TOKENS - 2], EOS]
    ids[: len(tokens)] = tokens
    return ids


def encode_box(box: Sequence[int]) -> list[int]:
    """Four answer ids of a box in pixels."""
    bins = [round(value * 100 / IMAGE_SIZE) for value in box]
    return [offset + value for offset, value in zip(PLACE_OFFSETS, bins, strict=True)]


def build_tokenizer(*, end_of_text: bool = False) -> PreTrainedTokenizerFast:
    """The same vocabulary as a Hugging Face tokenizer that prepends `<s>`, as LLaVA's does.

    Args:
        end_of_text: Also append `</s>`, where CLIP's text tower pools.
    """
    end = " </s>" if end_of_text else ""
    tokenizer = Tokenizer(models.WordLevel(vocab=dict(TOKEN_IDS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A{end}",
        pair=f"<s> $A $B{end}",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    special = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
