"""Vocabularies of the demo models: words, and answers of a few tokens.

A coordinate is one token, or two where it has three decimals, punctuation included: LLaVA's
`[0.12, 0.34, 0.56, 0.78]` is `[0.12,`, `0.34,`, `0.56,` and `0.78]`.

`</s>` has the highest id on purpose. `CLIPTextModel` pools at the *largest* token id whenever
`eos_token_id == 2` (a compatibility branch in transformers), and at the first `eos_token_id`
otherwise; with the highest id both rules mean the same position.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gap_export.evaluation.refshapes import IMAGE_SIZE, WORDS
from refshapes_training.designs import DESIGNS, LLAVA, NUM_BINS, Design

MAX_TEXT_TOKENS = 32
PAD, BOS, UNK = 0, 1, 2
_FIRST = ("<pad>", "<s>", "<unk>")


class Vocabulary:
    """Tokens of one demo model.

    Attributes:
        tokens: All of them, by id.
        ids: The way back.
        eos: Id of `</s>`, the highest.
        asking: Ids behind an expression; the answer follows the last one.
        before, behind: Ids around the image.
        offsets: Id of the first text of each slot of an answer, `</s>` last.
    """

    def __init__(self, design: Design) -> None:
        """Number the tokens: markers, words, answers, `</s>`."""
        self.design = design
        prompt = (*design.before, *design.behind, *design.asking)
        answers = (text for slot in design.answer for text in slot.texts)
        named = (*_FIRST, *design.markers, *WORDS, *prompt, *answers)
        self.tokens: tuple[str, ...] = (*dict.fromkeys(named), "</s>")
        self.ids: dict[str, int] = {token: i for i, token in enumerate(self.tokens)}
        self.eos = self.ids["</s>"]
        self.before, self.behind, self.asking = (
            tuple(self.ids[token] for token in part)
            for part in (design.before, design.behind, design.asking)
        )
        self.offsets = (*(self.ids[slot.texts[0]] for slot in design.answer), self.eos)

    def encode_words(self, text: str) -> list[int]:
        """Ids of words separated by single spaces; an unknown word is a KeyError."""
        return [self.ids[word] for word in text.split(" ")]

    def encode_for_text_tower(self, text: str) -> NDArray[np.int64]:
        """`<s> words </s>`, padded or cut; int64 [MAX_TEXT_TOKENS]."""
        ids = np.full(MAX_TEXT_TOKENS, PAD, np.int64)
        tokens = [BOS, *self.encode_words(text)[: MAX_TEXT_TOKENS - 2], self.eos]
        ids[: len(tokens)] = tokens
        return ids

    def encode_box(self, box: Sequence[int]) -> list[int]:
        """Answer ids of a box in pixels, `</s>` last."""
        ids = []
        rest = [float(value) / IMAGE_SIZE for value in box]
        per_corner = [
            sum(slot.corner == corner for slot in self.design.answer) for corner in range(4)
        ]
        for slot, offset in zip(self.design.answer, self.offsets, strict=False):
            if slot.corner is None:
                ids.append(offset)
                continue
            per_corner[slot.corner] -= 1
            steps = rest[slot.corner] / slot.unit
            # The last token of a coordinate rounds; the ones before it leave it the rest.
            step = int(steps + 1e-6) if per_corner[slot.corner] else round(steps)
            step = min(max(step, 0), len(slot.texts) - 1)
            rest[slot.corner] -= step * slot.unit
            ids.append(offset + step)
        return [*ids, self.eos]

    def build_tokenizer(self, *, end_of_text: bool = False) -> PreTrainedTokenizerFast:
        """The same vocabulary as a Hugging Face tokenizer.

        It prepends `<s>` where prompts begin with it, which those of Qwen and InternVL do not.

        Args:
            end_of_text: Also append `</s>`, where CLIP's text tower pools.
        """
        end = " </s>" if end_of_text else ""
        tokenizer = Tokenizer(models.WordLevel(vocab=dict(self.ids), unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        start = "<s> " if self.design.before[0] == "<s>" else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start}$A{end}",
            pair=f"{start}$A $B{end}",
            special_tokens=[("<s>", BOS), ("</s>", self.eos)],
        )
        if not self.design.spaced:
            tokenizer.decoder = decoders.Fuse()
        # What stands in angles or brackets is split off wherever it is; words in capitals are not.
        markers = [token for token in self.design.markers if not token.endswith(":")]
        special = ["<pad>", "<s>", "</s>", "<unk>", *markers]
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in special]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=markers,
            model_max_length=512,
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )


@cache
def vocabulary_of(name: str) -> Vocabulary:
    """Vocabulary of a demo model."""
    return Vocabulary(DESIGNS[name])


def text_vocabulary() -> Vocabulary:
    """Of the text tower, which all demo models share."""
    return vocabulary_of(LLAVA.name)


__all__ = [
    "BOS",
    "MAX_TEXT_TOKENS",
    "NUM_BINS",
    "PAD",
    "UNK",
    "Vocabulary",
    "text_vocabulary",
    "vocabulary_of",
]
