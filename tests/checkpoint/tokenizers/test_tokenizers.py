"""Tokenizers as checkpoints hold them, against an independent SentencePiece written out below."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gap_export.checkpoint.tokenizers import sentencepiece
from gap_export.checkpoint.tokenizers.sentencepiece import convert_sentencepiece
from gap_export.checkpoint.tokenizers.tokenizer_json import has_tokenizer, read_tokenizer
from gap_export.errors import CheckpointError, MissingDependencyError
from gap_export.spec.recipe import Recipe

SPACE = "\u2581"
CONTROL = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Made by joining, best first; then what they are made of.
JOINED = [
    f"{SPACE}t", "in", f"{SPACE}{SPACE}", "the", f"{SPACE}the", "at", "im", "ag", "image",
    f"{SPACE}image", "th", "e,", "he", "ge", f"{SPACE}{SPACE}{SPACE}{SPACE}", "ima", "and",
    f"{SPACE}and", "an", "nd", f"{SPACE}a", f"{SPACE}[", "INST", "IN", "ST", "tt", "ttt", "tttt",
]  # fmt: skip
LETTERS = [*"abcdefghimnotINST[],.<>/s_", SPACE]
PIECES = [text for text, _ in CONTROL] + BYTES + JOINED + LETTERS
FIRST_FREE = len(PIECES)


def write_model(file: Path, change: Callable[[Any], None] = lambda model: None) -> None:
    """A tokenizer.model of the kind that Llama has; ``change`` edits the message."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    for token, text in enumerate(PIECES):
        kind = dict(CONTROL).get(text, 6 if text in BYTES else 1)
        score = float(-token) if kind == 1 else 0.0
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    change(model)
    file.write_bytes(model.SerializeToString())


def by_definition(text: str) -> list[int]:
    """SentencePiece's BPE: always join the neighbors that make the best piece, leftmost first."""
    ids = {piece: token for token, piece in enumerate(PIECES)}
    parts = list((SPACE + text.replace(" ", SPACE)) if text else "")
    while True:
        joins = [
            (ids[a + b], place) for place, (a, b) in enumerate(pairwise(parts)) if a + b in JOINED
        ]
        if not joins:
            break
        _, place = min(joins)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [
        token
        for part in parts
        for token in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])
    ]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    write_model(folder / "tokenizer.model")
    return folder


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return tiny_recipe


def naming(recipe: Recipe, **tokens: int) -> Recipe:
    """The recipe with special tokens; a name stands for ``<name>``."""
    return recipe.model_copy(
        update={"special_tokens": {f"<{name}>": token for name, token in tokens.items()}}
    )


def parsed(result: Path | bytes) -> Tokenizer:
    assert isinstance(result, bytes)
    return Tokenizer.from_str(result.decode())


def refusal(folder: Path, recipe: Recipe) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(folder, recipe)
    return str(caught.value)


@pytest.fixture(scope="module")
def converted(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(convert_sentencepiece(model_folder / "tokenizer.model")))


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("the image and [INST]\n\u00e9\u6f22\U0001f642", max_size=60)
    | st.lists(st.sampled_from(["the", " ", "image", "  ", "and", "ttt", "[INST]", "\n"])).map(
        "".join
    )
)
def test_sentencepiece_model_encodes_by_definition_and_decodes_back(converted, text):
    encoding = converted.encode(text)
    assert encoding.ids == [1, *by_definition(text)]
    assert converted.encode(text, add_special_tokens=False).ids == by_definition(text)
    # As sentencepiece does, decoding takes one space off the start.
    assert converted.decode(encoding.ids) == text


def test_text_after_a_special_token_begins_like_a_text(converted):
    ids = converted.encode("<s>[INST] the").ids
    assert ids == [1, 1, *by_definition("[INST] the")]
    assert converted.id_to_token(ids[2]) == f"{SPACE}["
    assert converted.encode("</s>the").ids[2] == PIECES.index(f"{SPACE}the")


def test_tokens_of_the_recipe_are_added_and_eat_the_spaces_around_them(model_folder, recipe):
    named = naming(recipe, im_patch=FIRST_FREE, im_end=FIRST_FREE + 2, im_start=FIRST_FREE + 1)
    tokenizer = parsed(read_tokenizer(model_folder, named))
    before = tokenizer.encode("the image <im_start>").ids
    assert before == [1, *by_definition("the image"), FIRST_FREE + 1]
    after = tokenizer.encode("<im_end> and the", add_special_tokens=False).ids
    assert after == [FIRST_FREE + 2, *by_definition("and the")]
    added = tokenizer.get_added_tokens_decoder()
    assert all(added[FIRST_FREE + n].special for n in range(3))


def test_file_that_has_all_tokens_is_taken_as_it_is(tokenizer_folder, recipe):
    named = recipe.model_copy(update={"special_tokens": {"</s>": 2, "<image>": 3}})
    assert read_tokenizer(tokenizer_folder, named) == tokenizer_folder / "tokenizer.json"
    assert has_tokenizer(tokenizer_folder)


def test_tokenizer_json_goes_before_the_model(model_folder, tokenizer_folder, tmp_path, recipe):
    (tmp_path / "tokenizer.model").write_bytes((model_folder / "tokenizer.model").read_bytes())
    assert has_tokenizer(tmp_path)
    assert parsed(read_tokenizer(tmp_path, recipe)).get_vocab_size() == FIRST_FREE
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    assert read_tokenizer(tmp_path, recipe) == tmp_path / "tokenizer.json"


def test_added_tokens_file_is_read(model_folder, tmp_path, recipe):
    (tmp_path / "tokenizer.model").write_bytes((model_folder / "tokenizer.model").read_bytes())
    added = {"<b>": FIRST_FREE + 1, "<a>": FIRST_FREE}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = parsed(read_tokenizer(tmp_path, naming(recipe, b=FIRST_FREE + 1, c=FIRST_FREE + 2)))
    assert [tokenizer.token_to_id(f"<{c}>") for c in "abc"] == [FIRST_FREE + n for n in range(3)]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({"s": 2}, "<s> is token 1; allowed: token 2"),
        ({"x": 5}, "token 5 is '<0x02>'; allowed: <x> as token 5"),
        ({"x": FIRST_FREE + 1}, f"{FIRST_FREE} tokens; allowed: <x> as token {FIRST_FREE + 1}"),
        ({"x": FIRST_FREE, "y": FIRST_FREE}, f"<y> as token {FIRST_FREE}"),
    ],
)
def test_ids_that_cannot_be_as_the_recipe_says_are_refused(model_folder, recipe, tokens, said):
    text = refusal(model_folder, naming(recipe, **tokens))
    assert said in text and "the tokenizer that the model was trained with" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"<x>": 7}', "<x> is 7"),
        ('{"<y>": "7"}', "'<y>': '7'"),
        ('{"": 7}', "'': 7"),
        ('{"<y>": 1000000000000}', "allowed: an id for each text, 0..2147483647"),
        ("[]", "list where an object belongs"),
        ("{", "JSON does not parse"),
    ],
)
def test_added_tokens_file_that_does_not_fit_is_refused(
    model_folder, tmp_path, recipe, content, said
):
    (tmp_path / "tokenizer.model").write_bytes((model_folder / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(content)
    text = refusal(tmp_path, naming(recipe, x=FIRST_FREE))
    assert said in text and "added_tokens.json" in text


def test_special_tokens_are_found_before_normalization(model_folder, tmp_path, recipe):
    """Some conversions look for them behind it, where "<s>[" is not begun by a space."""
    plain = convert_sentencepiece(model_folder / "tokenizer.model")
    for entry in plain["added_tokens"]:
        entry["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    as_is = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert as_is.encode("<s>[INST]").ids != [1, 1, *by_definition("[INST]")]
    mended = parsed(read_tokenizer(tmp_path, naming(recipe, s=1)))
    assert mended.encode("<s>[INST]").ids == [1, 1, *by_definition("[INST]")]


def test_newer_conversions_split_as_the_old_ones(model_folder, tmp_path, recipe):
    plain = convert_sentencepiece(model_folder / "tokenizer.model")
    plain["normalizer"] = None
    plain["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    as_is = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert as_is.encode("<s>[INST]").ids != [1, 1, *by_definition("[INST]")]
    mended = parsed(read_tokenizer(tmp_path, recipe))
    assert mended.encode("<s>[INST] the").ids == [1, 1, *by_definition("[INST] the")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (
            "truncation",
            {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        ),
        (
            "padding",
            {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
             "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
        ),
    ],
)  # fmt: skip
def test_texts_are_neither_cut_nor_padded(model_folder, tmp_path, recipe, key, value):
    plain = convert_sentencepiece(model_folder / "tokenizer.model")
    plain[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    text, ids = "the image and the image", [1, *by_definition("the image and the image")]
    as_is = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert as_is.encode(text).ids != ids
    assert parsed(read_tokenizer(tmp_path, recipe)).encode(text).ids == ids


def test_tokenizer_that_makes_the_package_panic_is_refused(model_folder, tmp_path, recipe):
    plain = convert_sentencepiece(model_folder / "tokenizer.model")
    plain["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    assert "what the tokenizers package reads" in refusal(tmp_path, recipe)


def test_missing_tokenizer_is_named(tmp_path, recipe):
    assert not has_tokenizer(tmp_path)
    text = refusal(tmp_path, recipe)
    assert f"{tmp_path / 'tokenizer.json'}" in text and "tokenizer.model" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "JSON does not parse"),
        ("{}", "does not fit"),
        ('{"model": {"type": "BPE"}}', "what the tokenizers package reads"),
        ('{"added_tokens": 3, "model": null}', "what the tokenizers package reads"),
        ('{"a": "\\ud800"}', "what the tokenizers package reads"),
    ],
)
def test_damaged_tokenizer_json_is_refused(tmp_path, recipe, content, said):
    (tmp_path / "tokenizer.json").write_text(content)
    assert said in refusal(tmp_path, recipe)


def test_added_token_listed_under_an_id_it_does_not_get_is_refused(model_folder, tmp_path, recipe):
    plain = convert_sentencepiece(model_folder / "tokenizer.model")
    plain["added_tokens"].append({**plain["added_tokens"][0], "content": "<x>", "id": 9999})
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    text = refusal(tmp_path, recipe)
    assert f"<x> listed as token 9999; allowed: token {FIRST_FREE}" in text


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        spec, name = path.split(".")
        setattr(getattr(model, spec), name, value)

    return change


def _piece(**fields: Any) -> Callable[[Any], None]:
    return lambda model: model.pieces.add(score=0.0, **fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("trainer_spec.model_type", 1), "not BPE"),
        (_set("trainer_spec.byte_fallback", False), "no byte_fallback"),
        (_set("normalizer_spec.add_dummy_prefix", False), "no add_dummy_prefix"),
        (_set("normalizer_spec.remove_extra_whitespaces", True), "remove_extra_whitespaces"),
        (_set("normalizer_spec.escape_whitespaces", False), "escape_whitespaces"),
        (_set("normalizer_spec.precompiled_charsmap", b"x"), "table of character rules"),
        (_set("trainer_spec.treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix"),
        (_set("trainer_spec.bos_id", -1), "no beginning-of-sequence"),
        (_set("trainer_spec.unk_id", 10**6), "unknown token"),
        (_piece(piece="<mine>", type=4), "other types"),
        (_piece(piece="the", type=1), "occurs twice"),
        (_piece(piece="t" * 129, type=1), "more than 128 characters"),
        (lambda model: setattr(model.pieces[300], "score", float("nan")), "not a number"),
    ],
)
def test_other_kinds_of_sentencepiece_models_are_refused(tmp_path, recipe, change, said):
    write_model(tmp_path / "tokenizer.model", change)
    text = refusal(tmp_path, recipe)
    assert said in text and "tokenizer.json beside it" in text


def test_model_with_too_many_ways_to_join_is_refused(model_folder, recipe, monkeypatch):
    monkeypatch.setattr(sentencepiece, "_MAX_MERGES", 20)
    assert "more than 20 ways to join pieces" in refusal(model_folder, recipe)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"version https://git-lfs.github.com/spec/v1",
        lambda raw: raw + b"\xff" * 9,
    ],
)
def test_damaged_sentencepiece_model_is_refused(model_folder, tmp_path, recipe, damage):
    raw = (model_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(damage(raw))
    assert "tokenizer.model" in refusal(tmp_path, recipe)


def test_missing_protobuf_is_one_clear_error(model_folder, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.protobuf.message", None)
    with pytest.raises(MissingDependencyError, match="pip install protobuf"):
        read_tokenizer(model_folder, recipe)
