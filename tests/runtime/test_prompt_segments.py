"""Prompts of the paper's models: documented ids, with a stand-in for the Llama tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from gap_export.errors import BundleError, ExpressionError
from gap_export.runtime.prompt import PromptEncoder
from gap_export.spec.manifest import Manifest, PromptSpec

LLAVA_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
    "Please provide the bounding box coordinate of the region this sentence describes: "
    "{expression} ASSISTANT:"
)
LLAVA_PREFIX = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889,
    3148, 1001, 29901, 29871,
]  # fmt: skip
# The real pieces of the Llama vocabulary that these prompts are made of, by their real ids.
PIECES = {
    319: "▁A", 13563: "▁chat", 1546: "▁between", 263: "▁a", 12758: "▁curious", 1404: "▁user",
    322: "▁and", 385: "▁an", 23116: "▁artificial", 21082: "▁intelligence", 20255: "▁assistant",
    29889: ".", 450: "▁The", 4076: "▁gives", 8444: "▁helpful", 29892: ",", 13173: "▁detailed",
    1248: "▁pol", 568: "ite", 6089: "▁answers", 304: "▁to", 278: "▁the", 29915: "'", 29879: "s",
    5155: "▁questions", 3148: "▁US", 1001: "ER", 29901: ":", 29871: "▁",
}  # fmt: skip
NUM_IDS = 32_000
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def build_llama_like(special: tuple[str, ...] = ()) -> Tokenizer:
    """Sentencepiece's habits: a leading space, spaces as ▁, unknown characters as bytes.

    Letters that stand for nothing above are pieces of their own; what is asked of the tests is
    where pieces begin, not which they are.
    """
    pieces = dict(enumerate(["<unk>", "<s>", "</s>", *BYTES])) | PIECES
    letters = [c for c in map(chr, range(33, 127)) if c not in PIECES.values()]
    letters += [f"▁{c}" for c in letters if f"▁{c}" not in PIECES.values()]
    free = (number for number in range(1000, NUM_IDS) if number not in pieces)
    pieces |= {next(free): letter for letter in letters}
    filled = [(pieces.get(number, f"\0{number}"), -1.0) for number in range(NUM_IDS)]
    tokenizer = Tokenizer(models.Unigram(filled, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = ("<unk>", "<s>", "</s>", *special)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


MakeEncoder = Callable[..., PromptEncoder]


@pytest.fixture
def make_encoder(sample_manifest: Manifest, tmp_path: Path) -> MakeEncoder:
    def make(
        template: str,
        image_token: str = "<image>",
        special: tuple[str, ...] = (),
        tokenizer: Tokenizer | None = None,
    ) -> PromptEncoder:
        (tokenizer or build_llama_like(special)).save(str(tmp_path / "tokenizer.json"))
        prompt = PromptSpec(
            template=template,
            image_token=image_token,
            tokenization="segments",
            max_expression_tokens=64,
            max_new_tokens=8,
        )
        decoder = dataclasses.replace(sample_manifest.decoder, max_position_embeddings=4096)
        return PromptEncoder(
            dataclasses.replace(sample_manifest, prompt=prompt, decoder=decoder), tmp_path
        )

    return make


def spelled(ids: object) -> list[str]:
    tokenizer = build_llama_like(("<im_start>", "<im_end>"))
    return [tokenizer.id_to_token(int(number)) for number in ids]  # type: ignore[attr-defined]


def text_of(ids: object) -> str:
    """What ids spell, bytes and spaces included."""
    text = "".join(spelled(ids)).replace("▁", " ")
    return re.sub("<0x(..)>", lambda found: chr(int(found[1], 16)), text)


def test_image_of_llava_starts_at_slot_35(make_encoder):
    encoded = make_encoder(LLAVA_TEMPLATE).encode("a red cup")
    assert encoded.prefix_ids.tolist() == LLAVA_PREFIX
    assert len(encoded.prefix_ids) == 35
    # So 576 tokens take slots 35 to 610.
    assert len(encoded.prefix_ids) + 576 == 611
    # The second text begins as one of its own does, with a space, but not with <s>.
    assert spelled(encoded.suffix_ids)[:3] == ["▁", "<0x0A>", "P"]
    assert text_of(encoded.suffix_ids).endswith("describes: a red cup ASSISTANT:")


def test_tokenizer_is_never_asked_for_the_image_token(make_encoder):
    encoder = make_encoder(LLAVA_TEMPLATE)
    assert encoder.image_token_id is None
    assert 0 not in encoder.encode("a red cup").suffix_ids


def test_image_of_shikra_stands_in_mid_sentence(make_encoder):
    template = (
        "A chat between a curious user and an artificial intelligence assistant. USER: Can you "
        "point out {expression} in the image <im_start><image><im_end> and provide the "
        "coordinates of its location? ASSISTANT:"
    )
    encoder = make_encoder(template, special=("<im_start>", "<im_end>"))
    short, long = encoder.encode("a cup"), encoder.encode("a cup left of the user")
    for encoded, expression in ((short, "a cup"), (long, "a cup left of the user")):
        prefix, suffix = spelled(encoded.prefix_ids), spelled(encoded.suffix_ids)
        assert (prefix[0], prefix[-1], suffix[0]) == ("<s>", "<im_start>", "<im_end>")
        assert text_of(encoded.prefix_ids[1:-1]).startswith(" A chat between")
        assert f"point out {expression} in the image" in text_of(encoded.prefix_ids)
        assert "<s>" not in suffix
    assert len(short.prefix_ids) < len(long.prefix_ids)
    assert short.suffix_ids.tolist() == long.suffix_ids.tolist()


def test_prompt_of_minigpt_v2_begins_twice(make_encoder):
    template = (
        "<s>[INST] <Img><ImageHere></Img> [refer] give me the location of {expression} [/INST]"
    )
    encoder = make_encoder(template, image_token="<ImageHere>")
    encoded = encoder.encode("a red cup")
    assert encoded.prefix_ids[:2].tolist() == [1, 1]
    assert encoded.prefix_ids.tolist().count(1) == 2
    assert text_of(encoded.prefix_ids[2:]) == " [INST] <Img>"
    assert 1 not in encoded.suffix_ids
    assert (
        text_of(encoded.suffix_ids) == " </Img> [refer] give me the location of a red cup [/INST]"
    )


def test_answer_of_minigpt_v2_keeps_its_brackets(make_encoder):
    encoder = make_encoder(LLAVA_TEMPLATE)
    answer = "{<12><3><100><99>}"
    ids = build_llama_like().encode(answer, add_special_tokens=False).ids
    assert encoder.decode((*ids, 2)) == answer


@pytest.mark.parametrize(
    "expression", ["a <image> cup", "<image>", "the <s> cup", "cup</s>", "<unk>"]
)
def test_structure_cannot_be_written_into_an_expression(make_encoder, expression):
    with pytest.raises(ExpressionError, match="special token of the model: <"):
        make_encoder(LLAVA_TEMPLATE).encode(expression)


@pytest.mark.parametrize(
    "template",
    [
        "USER: {expression} ASSISTANT:",
        "<image> {expression} <image> ASSISTANT:",
        "USER: {expression}<image>",
    ],
)
def test_template_without_one_image_before_text_is_refused(make_encoder, template):
    with pytest.raises(BundleError, match="does not hold the image token once, before some text"):
        make_encoder(template).encode("a cup")


def test_tokenizer_that_closes_every_text_is_refused(make_encoder):
    closing = build_llama_like()
    closing.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(BundleError, match=r"ends every text with a special token.*2"):
        make_encoder(LLAVA_TEMPLATE, tokenizer=closing).encode("a cup")


def test_image_may_come_first(make_encoder):
    encoded = make_encoder("<image> {expression} ASSISTANT:").encode("a cup")
    assert encoded.prefix_ids.tolist() == [1]
    assert text_of(encoded.suffix_ids).endswith(" a cup ASSISTANT:")
