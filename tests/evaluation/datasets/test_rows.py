from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.errors import UsageError
from gap_export.evaluation.datasets import rows
from gap_export.evaluation.datasets.rows import (
    Row,
    is_inside,
    read_bytes,
    read_json,
    read_json_lines,
    read_json_rows,
)


def row(value: object) -> Row:
    return Row.of({"key": value}, "a.json, row 7")


OTHERS = {
    "box": [
        *(None, 3, "1,2,3,4", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, "4"], [1, 2, 3, True]),
        *([1, 2, 3, number] for number in (float("nan"), float("inf"), 10**400, None)),
    ],
    "text": [None, 3, ["a"], {"a": 1}, "half \ud800"],
    "label": ["", "x" * 201, "a\nb", "\x1b[2J", 3],
    "integer": [True, 2.0, "2", None],
    "texts": [[], ["a", 3], ["a", "\udfff"], None],
    "entries": [None, "a", {}],
}
ALLOWED = {
    "box": "four finite numbers",
    "text": "a text",
    "label": "(a text|1 to 200 characters that can be printed)",
    "integer": "a whole number",
    "texts": "a text, or a list of texts",
    "entries": "a list",
}


@pytest.mark.parametrize("method", OTHERS)
def test_value_of_another_kind_is_refused_with_its_row(method: str) -> None:
    for value in OTHERS[method]:
        said = rf"key of an annotation .*a\.json, row 7.*allowed: {ALLOWED[method]}"
        with pytest.raises(UsageError, match=said):
            getattr(row(value), method)("key")


def test_values_are_given_as_they_are_asked_for() -> None:
    assert row([1, 2.5, 3, 4]).box("key") == (1.0, 2.5, 4.0, 6.5)
    assert row("testA").label("key") == "testA"
    assert row("a").texts("key") == ["a"]
    assert row(["a", "b"]).texts("key") == ["a", "b"]


@pytest.mark.parametrize("value", [0, -3, 2.5, None])
def test_size_below_a_pixel_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="row 7"):
        row(value).size("key", "key")


def test_missing_value_is_said_to_be_missing() -> None:
    with pytest.raises(UsageError, match=r"row 7: missing; allowed"):
        row(1).entries("other")


@pytest.mark.parametrize("plain", [[], "text", None, 3.5])
def test_entry_that_is_no_object_is_refused(plain: object) -> None:
    with pytest.raises(UsageError, match="row 7"):
        Row.of(plain, "a.json, row 7")


@pytest.mark.parametrize("name", ["a.jpg", "b/c.jpg", "12:30.jpg", "..a.jpg", "./a.jpg", "ü.jpg"])
def test_is_inside_names_below(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../a.jpg",
        "b/../../a.jpg",
        "..",
        "C:/a.jpg",
        "b\\..\\a",
        "a\0.jpg",
        "a\x1b[2J.jpg",
    ],
)
def test_is_inside_names_that_lead_out(name: str) -> None:
    assert not is_inside(name)
    with pytest.raises(UsageError, match="below the data set's folder"):
        row(name).file_name("key")


def test_read_bytes_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", max_bytes=5) == b"12345"
    with pytest.raises(UsageError, match="5 bytes; allowed: at most 4"):
        read_bytes(tmp_path / "a", max_bytes=4)


def test_read_bytes_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_bytes(tmp_path / "a", max_bytes=4)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1" + b"0" * 5000 + b"]", b"[1,]"]
)
def test_read_json_of_something_else_is_refused(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(raw)
    with pytest.raises(UsageError, match="not JSON"):
        read_json(file)


def test_read_json_rows_names_the_row_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"a": 1}, 5]')
    with pytest.raises(UsageError, match="row 1: 5"):
        list(read_json_rows(file))
    file.write_text('{"a": 1}')
    with pytest.raises(UsageError, match="a list of objects"):
        list(read_json_rows(file))


def test_read_json_lines_counts_lines_from_one(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}')
    assert [one.where for one in read_json_lines(file)] == [f"{file}, line 1", f"{file}, line 3"]


def test_read_json_lines_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_MAX_LINE_BYTES", 20)
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": "' + "x" * 20 + '"}\n')
    with pytest.raises(UsageError, match=r"too long: .*line 2"):
        list(read_json_lines(file))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=6,
    )
)
def test_row_any_value_is_taken_or_refused(value: object) -> None:
    one = row(value)
    for read in (
        one.text,
        one.integer,
        one.entries,
        one.label,
        one.texts,
        one.corners,
        one.file_name,
    ):
        try:
            read("key")
        except UsageError as err:
            assert "row 7" in str(err)  # noqa: PT017  # which of them raise is not the point


@pytest.mark.parametrize("value", [2**63, -(10**5000)], ids=["64 bits", "thousands"])
def test_whole_number_beyond_64_bits_is_refused(value: int) -> None:
    with pytest.raises(UsageError, match="whole number of 64 bits"):
        row(value).integer("key")


def test_value_that_python_does_not_write_is_told_of() -> None:
    with pytest.raises(UsageError, match="too large to be written"):
        row(10**5000).text("key")
    with pytest.raises(UsageError, match="too large to be written"):
        Row.of(10**5000, "refs.p, reference 0")


def test_value_of_many_lists_is_told_of_in_a_line() -> None:
    knot: list[object] = []
    knot.extend([knot] * 6)
    with pytest.raises(UsageError) as refused:
        Row.of(knot, "refs.p, reference 0")
    assert len(str(refused.value)) < 500
