"""Expressions to ids: the prompt's structure is the template's, whatever the user writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gap_export.errors import BundleError, ExpressionError
from gap_export.runtime.prompt import PromptEncoder
from gap_export.spec.manifest import Manifest, PromptSpec


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


@pytest.fixture
def encoder(sample_manifest: Manifest, tokenizer_folder: Path) -> PromptEncoder:
    return PromptEncoder(sample_manifest, tokenizer_folder)


@pytest.fixture
def text_encoder(text_manifest: Manifest, tokenizer_folder: Path) -> PromptEncoder:
    return PromptEncoder(text_manifest, tokenizer_folder)


def with_prompt(manifest: Manifest, **changes: object) -> Manifest:
    prompt: PromptSpec = dataclasses.replace(manifest.prompt, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(manifest, prompt=prompt)


def test_prompt_is_split_at_the_image(encoder, tokenizer):
    encoded = encoder.encode("the small red circle")
    spell = tokenizer.id_to_token
    assert [spell(i) for i in encoded.prefix_ids] == ["<s>", "USER:"]
    assert [spell(i) for i in encoded.suffix_ids] == [
        "the", "small", "red", "circle", "ASSISTANT:",
    ]  # fmt: skip
    assert encoded.prefix_ids.dtype == encoded.suffix_ids.dtype == np.int64
    assert encoded.text_ids == ()
    assert encoded.warnings == ()


def test_space_around_an_expression_does_not_count(encoder):
    plain, spaced = encoder.encode("the star"), encoder.encode("  the star\n")
    assert spaced.suffix_ids.tolist() == plain.suffix_ids.tolist()


EMPTY, HIDDEN, SPECIAL = (
    r"expression is empty.*the red cup",
    "control character",
    "special token of the model: <",
)


@pytest.mark.parametrize(
    ("words", "expressions"),
    [
        (EMPTY, ["", "\n\t ", "\u3000\u00a0", "\u200b\u2060", "\u200d", "\u202e \u2028", "\ue000"]),
        ("not text: ", [None, 5, b"the star", ["the star"]]),
        (SPECIAL, ["the <image> star", "<image>", "star</s>", "<s>star", "<pad>", "a<unk>b"]),
        (SPECIAL, ["x <image><image>"]),
        (HIDDEN, ["a\nb", "a\tb", "a\0b", "a\x1b[2Jb", "a\x7fb", "a\ud800b", "a\ue000b"]),
        (HIDDEN, ["a\u202eb", "a\u200bb", "a\u2028b", "a\u2029b", "a\ufeffb"]),
        # Before it is tokenized.
        ("too long: 3000000 characters", ["x" * 3_000_000]),
    ],
    ids="empty no-text special twice control invisible long".split(),
)  # fmt: skip
def test_an_expression_that_cannot_be_used_is_refused(encoder, words, expressions):
    for expression in expressions:
        with pytest.raises(ExpressionError, match=words):
            encoder.encode(expression)


def test_longest_expression_is_accepted_and_one_more_word_is_not(encoder):
    assert len(encoder.encode(" ".join(["star"] * 12)).suffix_ids) == 13
    with pytest.raises(ExpressionError, match="too long: 13 tokens; allowed: at most 12 tokens"):
        encoder.encode(" ".join(["star"] * 13))


def test_joiners_of_scripts_and_emoji_are_accepted(encoder):
    assert (
        len(encoder.encode("\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f466").suffix_ids) == 3
    )


def test_word_without_a_token_is_refused_where_there_is_none_for_unknown_words(
    sample_manifest, tokenizer_folder, tmp_path
):
    plain = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    plain["model"]["unk_token"] = "[nothing]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    encoder = PromptEncoder(sample_manifest, tmp_path)
    assert len(encoder.encode("the star").suffix_ids) == 3
    with pytest.raises(ExpressionError, match=r"cannot encode this text: 'the zebra'.*other words"):
        encoder.encode("the zebra")


def test_braces_are_words_like_others(encoder, tokenizer):
    encoded = encoder.encode("{expression} {0} %s star")
    assert len(encoded.suffix_ids) == 5
    assert tokenizer.id_to_token(int(encoded.suffix_ids[3])) == "star"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(expression=st.text(max_size=60))
def test_any_text_is_refused_or_stays_within_the_template(encoder, tokenizer, expression):
    try:
        encoded = encoder.encode(expression)
    except ExpressionError:
        return
    specials = {tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "</s>", "<image>")}
    assert [tokenizer.id_to_token(i) for i in encoded.prefix_ids] == ["<s>", "USER:"]
    assert tokenizer.id_to_token(int(encoded.suffix_ids[-1])) == "ASSISTANT:"
    assert not specials & set(encoded.suffix_ids.tolist())


def test_unknown_words_are_named_once(encoder):
    encoded = encoder.encode("the purple star left of the purple moon")
    assert encoded.warnings == ("words the model does not know: purple, moon",)


def test_words_for_the_text_tower_keep_its_end_when_cut(text_encoder, tokenizer):
    spell = tokenizer.id_to_token
    (short,) = text_encoder.encode("the star").text_ids
    (long,) = text_encoder.encode("the small red circle above the star").text_ids
    assert [spell(i) for i in short] == ["<s>", "the", "star", "</s>"]
    assert [spell(i) for i in long] == ["<s>", "the", "small", "red", "circle", "above", "</s>"]


def test_words_for_the_text_tower_go_on_in_segments_where_the_pruner_has_it_so(
    text_manifest, tokenizer_folder, tokenizer
):
    assert text_manifest.text_encoder is not None
    tower = dataclasses.replace(text_manifest.text_encoder, long_texts="segments")
    encoder = PromptEncoder(
        dataclasses.replace(text_manifest, text_encoder=tower), tokenizer_folder
    )
    spell = tokenizer.id_to_token
    long = "<s> the small red circle above the"
    for words, segments in (
        ("the star", ["<s> the star </s>"]),
        ("the small red circle above", ["<s> the small red circle above </s>"]),
        ("the small red circle above the", [long, "</s>"]),
        ("the small red circle above the star", [long, "star </s>"]),
    ):
        found = encoder.encode(words).text_ids
        assert [" ".join(map(spell, ids.tolist())) for ids in found] == segments


def test_the_text_tower_reads_the_declared_template(text_manifest, tokenizer_folder, tokenizer):
    assert text_manifest.text_encoder is not None
    tower = dataclasses.replace(text_manifest.text_encoder, template="above {expression} ?")
    encoder = PromptEncoder(
        dataclasses.replace(text_manifest, text_encoder=tower), tokenizer_folder
    )
    (ids,) = encoder.encode("the star").text_ids
    words = [tokenizer.id_to_token(i) for i in ids]
    assert words == ["<s>", "above", "the", "star", "<unk>", "</s>"]


def test_context_counts_pruned_tokens(sample_manifest, tokenizer_folder):
    # <s> USER: + 16 visual tokens + 3 words + ASSISTANT: = 22, and 8 for the answer.
    def encoder(limit: int) -> PromptEncoder:
        decoder = dataclasses.replace(sample_manifest.decoder, max_position_embeddings=limit)
        manifest = dataclasses.replace(sample_manifest, decoder=decoder)
        return PromptEncoder(manifest, tokenizer_folder)

    assert len(encoder(30).encode("the red star").suffix_ids) == 4
    with pytest.raises(ExpressionError, match=r"does not fit.*22 position ids.*allowed: 29"):
        encoder(29).encode("the red star")


@pytest.mark.parametrize(
    "template", ["USER: {expression} ASSISTANT:", "<image> {expression} <image>", "<image>"]
)
def test_template_without_one_image_before_text_is_refused(
    sample_manifest, tokenizer_folder, template
):
    encoder = PromptEncoder(with_prompt(sample_manifest, template=template), tokenizer_folder)
    with pytest.raises(BundleError, match="does not hold the image token once"):
        encoder.encode("the star")


def test_image_token_that_the_tokenizer_does_not_know_is_refused(sample_manifest, tokenizer_folder):
    manifest = with_prompt(sample_manifest, image_token="<photo>")
    with pytest.raises(BundleError, match="does not know the image token: <photo>"):
        PromptEncoder(manifest, tokenizer_folder)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"model": 5}'])
def test_tokenizer_that_is_none_is_refused(sample_manifest, tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer (cannot be read|is not one)"):
        PromptEncoder(sample_manifest, tmp_path)


def test_answer_is_spelled_without_special_tokens(encoder, tokenizer):
    ids = tuple(tokenizer.encode("[ 0.12 , 0.34 ]", add_special_tokens=False).ids)
    assert encoder.decode((*ids, 2)) == "[ 0.12 , 0.34 ]"
    assert encoder.decode(()) == ""


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_a_tokenizer_saved_with_cutting_or_filling_does_neither(
    sample_manifest, tokenizer_folder, tmp_path, setting
):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "assets"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if setting == "truncation":
        tokenizer.enable_truncation(3)
    else:
        tokenizer.enable_padding(length=40)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "the small red circle"
    plain = PromptEncoder(sample_manifest, tokenizer_folder).encode(text)
    ours = PromptEncoder(sample_manifest, folder).encode(text)
    assert ours.suffix_ids.tolist() == plain.suffix_ids.tolist()
    assert ours.prefix_ids.tolist() == plain.prefix_ids.tolist()


def test_a_tokenizer_that_makes_its_parser_panic_is_refused(
    sample_manifest, tokenizer_folder, tmp_path
):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "assets"))
    plain = json.loads((folder / "tokenizer.json").read_text())
    plain["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(BundleError, match="tokenizer"):
        PromptEncoder(sample_manifest, folder)
