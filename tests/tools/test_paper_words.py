"""What tools/paper_table.py says of its rows must follow from them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gap_export.spec.recipe import find_recipe

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def words(monkeypatch):
    """The module, which lies beside the tool."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    monkeypatch.syspath_prepend(str(TOOLS))
    from paper_report import words as paper_words

    yield paper_words
    for name in ("paper_report.words", "paper_report.measured", "paper_report", "pages"):
        sys.modules.pop(name, None)


def row(pruner: str, keep: float, positions: str, accuracy: float, *, width: float = 0.02) -> dict:
    return {
        "model": "tiny",
        "protocol": "unpad",
        "seed": 0,
        "pruner": pruner,
        "pruner_text": None,
        "budget": "fixed",
        "keep_ratio": keep,
        "positions": positions,
        "mean_visual_tokens": 144 * keep,
        "n": 100,
        "num_images": 25,
        "acc_at_50": accuracy,
        "ci95": (accuracy - width, accuracy + width),
        "mean_iou": accuracy,
        "parse_failures": 0,
        "recovered": None if positions == "none" else accuracy / 0.9,
    }


def measured(compact: float, gap: float, **options):
    """One pruner at three shares, all of them alike."""
    rows = [row("none", 1.0, "none", 0.9), row("none", 1.0, "permuted", 0.05)]
    for keep in (0.5, 0.3, 0.1):
        rows += [
            row("spatial", keep, "compact", compact, **options),
            row("spatial", keep, "gap", gap, **options),
        ]
    return found_of(rows, "refshapes-llava")


def found_of(rows: list[dict], model: str):
    from paper_report.measured import Measured

    return Measured(recipe=find_recipe(model)[0], spec="refshapes", all_rows=rows)


def test_a_collapse_and_a_recovery_are_told(words):
    text = words.format_summary([measured(0.03, 0.88)], command="tools/paper_table.py")
    assert "at most 3.3 % of the unpruned accuracy (`spatial`; not more than a tenth)" in text
    assert "brings back 97.8 % with the best pruner" in text
    assert "90.0 % with 1 of 1 (`spatial`)" in text
    assert "do not overlap for 1 of 1 pruners" in text
    assert "GAP is ahead of compact ids in every row and column." in text
    assert "| permuted | 5.0 % | 3.0-7.0 % |" in text


def test_what_falls_short_is_told(words):
    text = words.format_summary([measured(0.4, 0.4)], command="tools/paper_table.py")
    assert "more than a tenth" in text
    assert "not more than a tenth" not in text
    assert "with 0 of 1;" in text
    assert "do not overlap for 0 of 1 pruners" in text
    assert (
        "GAP is not ahead of compact ids for `spatial` at keep 0.5, `spatial` at keep 0.3" in text
    )


def test_intervals_that_touch_overlap(words):
    text = words.format_summary([measured(0.5, 0.6, width=0.05)], command="x")
    assert "do not overlap for 0 of 1 pruners" in text


def test_the_papers_figures_stand_beside_with_their_source(words):
    text = words.format_summary([measured(0.03, 0.88)], command="x")
    (line,) = [line for line in text.splitlines() if line.startswith("| llava-1.5-7b |")]
    assert "56.1 % | 15.3 % | **51.4 %** | 27.3 % | 91.6 %" in line
    assert "arXiv 2506.21873" in line


def test_every_row_of_a_model_says_what_it_is(words):
    lines = words.format_model(measured(0.03, 0.88)).splitlines()
    assert len(lines) == 2 + 8
    assert (
        "| tiny | unpad | 0 | spatial | 0.3 | 43.2 | gap | 100 | 88.0 % | 86.0-90.0 % |"
        in (lines[-3])
    )


def texts(model: str) -> list[dict]:
    """Pruners that read the text, by what they read and how many they keep."""
    accuracies = {"expression": {0.3: 0.9, 0.1: 0.5}, "question": {0.3: 0.8, 0.1: 0.4}}
    return [
        {**row(pruner, keep, positions, accuracy), "model": model, "pruner_text": text}
        for pruner in ("text", "trim")
        for text, by_keep in accuracies.items()
        for keep, accuracy in by_keep.items()
        for positions in ("compact", "gap")
    ]


def test_both_texts_are_told_and_the_authors_is_the_default(words):
    rows = [row("none", 1.0, "none", 0.9), *texts("refshapes-shikra")]
    found = found_of(rows, "refshapes-shikra")
    # Tables of pruners have each as its authors do.
    defaults = {(r["pruner"], r["pruner_text"]) for r in found.rows() if r["pruner"] != "none"}
    assert defaults == {("text", "expression"), ("trim", "question")}
    lines = words._texts(found, {"n": 100})
    assert '"In the given could you find and tell me the coordinates of {expression} ?"' in lines[1]
    assert lines[-2:] == [
        "| `text` | **90.0 %** (88.0-92.0 %) | **50.0 %** (48.0-52.0 %) | 80.0 % (78.0-82.0 %) "
        "| 40.0 % (38.0-42.0 %) |",
        "| `trim` | 90.0 % (88.0-92.0 %) | 50.0 % (48.0-52.0 %) | **80.0 %** (78.0-82.0 %) "
        "| **40.0 %** (38.0-42.0 %) |",
    ]


def test_a_row_of_fewer_expressions_than_the_table_says_so(words):
    rows = measured(0.03, 0.88).rows()
    fewer = [{**r, "n": 25} if r["keep_ratio"] == 0.3 else r for r in rows]
    text = words.format_card(found_of(fewer, "refshapes-llava"), command="x")
    (line,) = [line for line in text.splitlines() if line.startswith("| `spatial`")]
    whole, few = "**88.0 %** (86.0-90.0 %)", "**88.0 %** (86.0-90.0 %; n 25)"
    assert line == f"| `spatial` | 3.0 % | {whole} | 3.0 % | {few} | 3.0 % | {whole} |"


def test_where_the_question_is_the_expression_nothing_is_compared(words):
    rows = [{**r, "pruner_text": "expression"} for r in texts("refshapes-llava")]
    (_, line) = words._texts(found_of(rows, "refshapes-llava"), {"n": 100})
    assert line.startswith("The question is the expression itself: `text`, `trim`")


def test_rows_measured_anew_replace_those_of_before(words, tmp_path):
    from paper_report.measured import merge_rows, read_csv, write_csv

    before = [row("none", 1.0, "none", 0.9), *texts("m")]
    write_csv(tmp_path / "a.csv", before)
    read = read_csv(tmp_path / "a.csv")
    assert [r["acc_at_50"] for r in read] == [r["acc_at_50"] for r in before]
    anew = {**row("trim", 0.3, "gap", 0.7), "pruner_text": "question"}
    merged = merge_rows(read, [anew])
    assert len(merged) == len(before) and merged[0]["pruner"] == "none"
    assert [r["acc_at_50"] for r in merged if r["acc_at_50"] == 0.7] == [0.7]
    # What was published before there was a choice was of the expression.
    old = (tmp_path / "a.csv").read_text().splitlines()
    place = old[0].split(",").index("pruner_text")
    cut = [",".join(part for n, part in enumerate(line.split(",")) if n != place) for line in old]
    (tmp_path / "old.csv").write_text("\n".join(cut))
    assert {r["pruner_text"] for r in read_csv(tmp_path / "old.csv")} == {None, "expression"}


def test_what_was_not_measured_as_the_authors_have_it_says_what_it_read(words):
    rows = [row("none", 1.0, "none", 0.9)]
    for keep, text in (
        (0.5, "expression"),
        (0.3, "expression"),
        (0.3, "question"),
        (0.1, "question"),
    ):
        pair = (row("trim", keep, positions, 0.6) for positions in ("compact", "gap"))
        rows += [{**one, "pruner_text": text} for one in pair]
    lines = words.format_card(found_of(rows, "refshapes-shikra"), command="x").splitlines()
    main, texts_read = (line for line in lines if line.startswith("| `trim`"))
    assert main.count("read the") == 1
    assert main.startswith("| `trim` | 60.0 % | **60.0 %** (58.0-62.0 %; read the expression) |")
    assert texts_read.count("not measured") == 1


def test_rows_of_an_evaluation_are_those_of_pruners_with_their_budget(words):
    from paper_report.measured import rows_of

    adaptive = {**row("prumerge", 1.0, "gap", 0.4), "mean_visual_tokens": 28.0}
    rows = [row("none", 1.0, "none", 0.9), row("visionzip", 1.0, "gap", 0.9), adaptive]
    rows.append({**row("trim", 0.3, "gap", 0.7), "pruner_text": "question"})
    found = rows_of(find_recipe("refshapes-llava")[0], {"rows": rows})
    assert [(r["pruner"], r["budget"], r["pruner_text"]) for r in found] == [
        ("visionzip", "fixed", None),
        ("prumerge", "adaptive", None),
        # There the question is the expression.
        ("trim", "fixed", "expression"),
    ]


def test_second_baseline_and_smaller_images_stand_where_they_were_measured(words):
    rows = [row("none", 1.0, "none", 0.9), row("none", 1.0, "compact", 0.4)]
    for keep in (0.5, 0.3, 0.1):
        for positions, share in (("compact", 0.1), ("text-shifted", 0.3), ("gap", 0.8)):
            rows.append(row("spatial", keep, positions, share))
        tokens = 144 * keep + 1
        rows.append({**row("none", 1.0, "smaller-image", 0.7), "mean_visual_tokens": tokens})
    found = found_of(rows, "refshapes-llava")
    from paper_report.measured import merge_rows

    assert merge_rows(rows, rows) == merge_rows(rows, [])
    assert len(merge_rows(rows, rows)) == len(rows) == len(found.rows())
    card = words.format_card(found, command="make")
    assert "keep 0.3: compact | text-shifted | GAP" in card
    assert "| compact | 40.0 % |" in card
    assert card.count("| not measured | 70.0 % (68.0-72.0 %) | `spatial` |") == 3
    plain = words.format_card(measured(0.1, 0.8), command="make")
    assert "text-shifted" not in plain and "smaller image" not in plain
    counted = [{**one, "gmac": one["mean_visual_tokens"], "first_token_ms": 8.04} for one in rows]
    card = words.format_card(found_of(counted, "refshapes-llava"), command="make")
    assert "| 44 | 30.7 %, 8.0 ms | 70.0 %" in card
    assert "| `spatial` | 43 | 30.0 %, 8.0 ms | **80.0 %**" in card
