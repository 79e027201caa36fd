"""Files of answers: what comes back, what is dropped, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from gap_export.errors import OutputError
from gap_export.evaluation.records import Record, RecordsFile

HEADER = {"model": "sample", "questions": "abc", "seed": "0"}
PIECES = [("a", "b"), ("c",), ("d", "e")]


def record(question_id, **changes):
    plain = Record(
        question_id=question_id,
        text="[0.1, 0.2, 0.30, 0.7]",
        fractions=(0.1, 0.2, 0.3, 0.7),
        box=(6.4, 12.8, 19.2, 44.800000000000004),
        image_size=(64, 48),
        num_kept_tokens=5,
        num_visual_tokens=16,
        timings_ms={"prefill": 1.25, "total": 3.5},
        batch_size=2,
        backend="numpy",
    )
    return replace(plain, **changes)


def open_file(path, header=HEADER, pieces=PIECES):
    return RecordsFile(path, header, pieces=pieces)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "unpruned.jsonl"


@pytest.fixture
def written(path):
    """Two pieces of three."""
    with open_file(path) as file:
        file.add([record("a"), record("b")])
        file.add([record("c")])
    return path


def test_records_come_back_as_they_were(path):
    records = [
        record("a", text="\ud800 \x00 ✓", fractions=None, box=None),
        record("b", error="the image is damaged", backend=""),
    ]
    with open_file(path) as file:
        file.add(records)
        assert file.records == {"a": records[0], "b": records[1]}
    with open_file(path) as file:
        assert file.records == {"a": records[0], "b": records[1]}


def test_what_is_added_is_in_the_file_at_once(path):
    with open_file(path) as file:
        file.add([record("c")])
        assert json.loads(path.read_text().splitlines()[-1])["question_id"] == "c"


def test_a_file_that_was_cut_off_anywhere_goes_on_with_whole_pieces(written):
    whole = written.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    header, _, second, third = ends
    at_ends = {end + step for end in ends for step in (-1, 0, 1)}
    for length in sorted({*range(header, len(whole), 17), *at_ends} & {*range(header, len(whole))}):
        written.write_bytes(whole[:length])
        with open_file(written) as file:
            kept = set(file.records)
            assert kept == (set("ab") if length >= second else set())
            file.add([record(name) for name in sorted(set("abc") - kept)])
        assert written.read_bytes() == whole
    assert third == len(whole)


def test_an_empty_file_is_a_new_one(path):
    path.touch()
    with open_file(path) as file:
        assert file.records == {}
        file.add([record("c")])
    with open_file(path) as file:
        assert set(file.records) == {"c"}


@pytest.mark.parametrize("change", [{"model": "other"}, {"seed": "1"}, {"engines": "rtx"}])
def test_records_of_another_evaluation_are_refused_with_what_differs(written, change):
    (key,) = change
    before = written.read_bytes()
    with pytest.raises(OutputError, match=f"another evaluation.* has {key} "):
        open_file(written, {**HEADER, **change})
    assert written.read_bytes() == before


def test_what_a_header_no_longer_says_is_a_difference(written):
    with pytest.raises(OutputError, match="has seed 0, asked is none"):
        open_file(written, {key: value for key, value in HEADER.items() if key != "seed"})


@pytest.mark.parametrize("content", ["hello", '{"rows": []}\n', "[1, 2]\n", "\x00" * 9])
def test_a_file_of_something_else_is_refused_and_left_alone(path, content):
    path.write_text(content)
    with pytest.raises(OutputError, match="something else"):
        open_file(path)
    assert path.read_text() == content


def test_records_are_not_written_through_a_link_nor_into_a_pipe(path, tmp_path):
    (tmp_path / "empty").touch()
    path.symlink_to(tmp_path / "empty")
    with pytest.raises(OutputError, match=r"cannot be read or written.*symbolic links"):
        open_file(path)
    assert (tmp_path / "empty").read_bytes() == b""
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OutputError, match="something else"):
        open_file(path)


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "{}",
        '{"question_id": "c"}',
        "[]",
        json.dumps({**vars(record("c")), "box": [1, 2]}),
        json.dumps({**vars(record("c")), "text": 3}),
        json.dumps({**vars(record("c")), "image_size": None}),
        json.dumps({**vars(record("c")), "nonsense": 1}),
        json.dumps({**vars(record("c")), "timings_ms": []}),
        json.dumps({**vars(record("c")), "timings_ms": {"total": float("nan")}}),
        json.dumps({**vars(record("c")), "box": [0, 0, 1, float("inf")]}),
        json.dumps({**vars(record("c")), "box": [0, 0, 1, 10**400]}),
        json.dumps({**vars(record("c")), "image_size": [float("inf"), 1]}),
        json.dumps({**vars(record("c")), "image_size": [0, 0]}),
        json.dumps({**vars(record("c")), "num_kept_tokens": "5"}),
        json.dumps({**vars(record("c")), "num_visual_tokens": 10**400}),
        json.dumps({**vars(record("c")), "batch_size": None}),
        json.dumps({**vars(record("c")), "error": 5}),
        json.dumps({**vars(record("c")), "fault": "none"}),
        "[" * 100_000,
    ],
)
def test_a_damaged_line_is_refused_by_its_number(written, line):
    with written.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(OutputError, match=r"damaged.*line 5"):
        open_file(written)


def test_records_being_written_by_another_evaluation_are_refused(path):
    with open_file(path), pytest.raises(OutputError, match="another evaluation is writing"):
        open_file(path)
    with open_file(path):
        pass


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OutputError, match="cannot be read or written"):
        open_file(tmp_path)
    with pytest.raises(OutputError, match="cannot be read or written"):
        open_file(tmp_path / "missing" / "file.jsonl")


def test_a_header_that_was_cut_off_is_written_again(path):
    with open_file(path):
        pass
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with open_file(path) as file:
        assert file.records == {}
    assert path.read_bytes() == whole


def test_a_header_of_brackets_alone_is_something_else(path):
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(OutputError, match="there is something else"):
        open_file(path)


def test_an_image_that_could_not_be_read_is_asked_about_again(path):
    broken = record("b", error="b.png is damaged", fault="broken picture", backend="")
    with open_file(path) as file:
        file.add([record("a"), broken])
        file.add([record("c", error="too long", fault="refused expression", backend="")])
    with open_file(path) as file:
        assert file.records.keys() == {"c"}
        file.add([record("a"), record("b")])
    with open_file(path) as file:
        assert file.records["b"] == record("b")
        assert file.records.keys() == {"a", "b", "c"}
