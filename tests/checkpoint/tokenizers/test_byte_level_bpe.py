"""Qwen2's tokenizer made of vocab.json and merges.txt, against transformers' own of the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gap_export.checkpoint.tokenizers.tokenizer_json import has_tokenizer, read_tokenizer
from gap_export.errors import CheckpointError
from gap_export.spec.recipe import Recipe
from tests.families.tiny_internvl import (
    plain_recipe,
    special_tokens,
    their_tokenizer,
    vocabulary,
    write_slow_tokenizer,
)

RECIPE = Recipe.model_validate(plain_recipe())
TEXTS = [
    "Please provide the bounding box coordinate of the region",
    "<|im_start|>user\n<img><IMG_CONTEXT></img>\nthe  lady's box:\t12,345 <ref>x</ref><|im_end|>\n",
    "   leading and trailing   ",
    "don't WE'LL\r\n\r\n  x",
    "你是书生·万象 — naïve café ﬁ e\u0301 \U0001f600",
    "[[243, 469, 558, 746]]",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("slow")
    write_slow_tokenizer(found)
    return found


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    made = read_tokenizer(folder, RECIPE)
    assert isinstance(made, bytes)
    return Tokenizer.from_str(made.decode())


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return their_tokenizer(folder)


def test_such_a_folder_has_a_tokenizer(folder: Path):
    assert has_tokenizer(folder)
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_equal_transformers(ours: Tokenizer, theirs: Any, text: str):
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.one_of(st.sampled_from([*special_tokens(), " ", "\n", "box", "'s"]), st.text()),
        max_size=8,
    )
)
def test_any_text_has_transformers_ids(ours: Tokenizer, theirs: Any, parts: list[str]):
    text = "".join(parts).encode("utf-8", "ignore").decode()
    assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_merges_are_used(ours: Tokenizer):
    _, merges = vocabulary()
    assert len(ours.encode("bounding").ids) < len("bounding")
    assert ours.token_to_id("".join(merges[0])) is not None


def test_what_is_special_is_said_by_the_tokenizer_s_config(folder: Path, tmp_path: Path):
    write_slow_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    token = len(vocabulary()[0]) + len(special_tokens())
    added = {**special_tokens(), "<tool_call>": token, "<mask>": token + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    config["added_tokens_decoder"][str(token)] = {"content": "<tool_call>", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = read_tokenizer(tmp_path, RECIPE)
    assert isinstance(made, bytes)
    tokenizer = Tokenizer.from_str(made.decode())
    ids = tokenizer.encode("<tool_call> <mask><|im_end|>").ids
    assert ids == [token, tokenizer.token_to_id("Ġ"), token + 1, special_tokens()["<|im_end|>"]]
    # What is not listed is taken for special.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call> "


def test_tokens_that_only_the_tokenizer_s_config_lists_are_there(folder: Path, tmp_path: Path):
    write_slow_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    few = {text: special_tokens()[text] for text in ("<img>", "</box>")}
    recipe = RECIPE.model_copy(update={"special_tokens": few})
    assert read_tokenizer(tmp_path, recipe) == read_tokenizer(folder, RECIPE)


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', r"GPT2Tokenizer.*Qwen2"),
        ("tokenizer_config.json", "{}", r"None.*allowed: Qwen2Tokenizer"),
        ("tokenizer_config.json", "[", r"JSON does not parse"),
        ("vocab.json", '{"a": 0, "b": 2}', r"vocab\.json: ids other than 0, 1, 2"),
        ("vocab.json", '{"a": 0, "b": true}', r"vocab\.json: ids other than 0, 1, 2"),
        ("vocab.json", '{"a": "0"}', r"vocab\.json: ids other than 0, 1, 2"),
        ("vocab.json", "{}", r"vocab\.json: ids other than 0, 1, 2"),
        ("merges.txt", "#version: 0.2\na b c\n", r"merges\.txt: line 2: 'a b c'"),
        ("merges.txt", "#version: 0.2\nab\n", r"merges\.txt: line 2: 'ab'"),
        ("merges.txt", "no-such no-piece\n", r"merges\.txt"),
        ("added_tokens.json", '{"<img>": 7}', r"<img> is 7"),
        ("added_tokens.json", '{"<new>": 999}', r"999|<new>"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, text: str, says: str):
    write_slow_tokenizer(tmp_path)
    write(tmp_path, name, text)
    with pytest.raises(CheckpointError, match=says):
        read_tokenizer(tmp_path, RECIPE)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, name: str):
    write_slow_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_tokenizer(tmp_path, RECIPE)


def test_merges_that_are_no_text_are_refused(tmp_path: Path):
    write_slow_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        read_tokenizer(tmp_path, RECIPE)
