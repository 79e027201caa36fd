"""Rows, comparisons and gallery out of records that are made up here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gap_export.evaluation.protocols import PROTOCOLS
from gap_export.evaluation.questions import Unusable
from gap_export.evaluation.settings import Setting
from gap_export.evaluation.summary import GALLERY_SIZE, Judging
from gap_export.parity.metrics import paired_difference_interval, wilson_interval
from tests.evaluation.answers import WHOLE, question, record

RIGHT, HALF, WRONG = "[0.0, 0.0, 0.5, 0.5]", "[0.0, 0.0, 0.5, 0.4]", "[0.6, 0.6, 0.9, 0.9]"
TRUTH = (0.0, 0.0, 320.0, 240.0)


def setting(name):
    return Setting(name=name, bundle=Path("b"), pruner="spatial", keep_ratio=0.3, positions="gap")


def questions(number, per_image=2):
    return [
        replace(
            question(TRUTH),
            id=str(n),
            image_id=f"image {n // per_image}",
            kind="relation" if n % 2 else "attribute",
            split="val" if n < number / 2 else "testA",
        )
        for n in range(number)
    ]


def judging(asked, unusable=(), protocol="tolerant"):
    return Judging(
        questions=asked,
        unusable=unusable,
        protocol=PROTOCOLS[protocol],
        box_spec=WHOLE,
        model="sample",
        seed=0,
    )


def judge(judge_, texts, name="gap", **changes):
    records = {
        one.id: replace(record(text, WHOLE), question_id=one.id, **changes)
        for one, text in zip(judge_.questions, texts, strict=True)
    }
    return judge_.judge(setting(name), records)


def unusable(question_id, reason):
    return Unusable(
        question_id=question_id, image_id="x", split="val", kind=None, reason=reason, detail=""
    )


def test_a_row_sums_up_its_answers():
    judge_ = judging(questions(8))
    texts = [RIGHT, HALF, WRONG, "no idea", RIGHT, WRONG, "(0.0 0.0 0.5 0.5)", RIGHT]
    row = judge_.row(judge(judge_, texts), unpruned=0.8)
    assert (row.n, row.num_images, row.parse_failures, row.num_tolerant) == (8, 4, 1, 1)
    assert row.acc_at_50 == 5 / 8
    assert row.recovered == pytest.approx(5 / 8 / 0.8)
    assert row.mean_iou == pytest.approx((4 + 0.8) / 8)
    assert row.curve == {f"0.{n}": (5 if n < 8 else 4) / 8 for n in range(1, 10)}
    assert row.ci95[0] < row.acc_at_50 < row.ci95[1]
    assert {name: part.acc_at_50 for name, part in row.by_split.items()} == {
        "val": 2 / 4,
        "testA": 3 / 4,
    }
    assert {name: (part.n, part.acc_at_50) for name, part in row.by_kind.items()} == {
        "attribute": (4, 3 / 4),
        "relation": (4, 2 / 4),
    }
    assert row.other_protocols.keys() == PROTOCOLS.keys() - {"tolerant", "minigpt-v2", "internvl"}
    # That of lmms-eval reads no round brackets.
    assert row.other_protocols["lmms"] == 4 / 8


def test_a_row_counts_answers_that_are_out_of_scale_and_cut_off():
    judge_ = judging(questions(6))
    texts = [RIGHT, "[0, 0, 320, 240]", "(0, 0, 320, 240)", "no idea", "[0, 0, 1.02, 1]", RIGHT]
    row = judge_.row(judge(judge_, texts), unpruned=None)
    assert (row.num_out_of_scale, row.num_cut_off) == (2, 0)
    row = judge_.row(judge(judge_, texts, cut_off=True), unpruned=None)
    assert (row.num_out_of_scale, row.num_cut_off) == (2, 6)


def test_what_could_not_be_asked_is_wrong_and_what_cannot_be_right_is_left_out():
    missing, empty = unusable("8", "missing picture"), unusable("9", "empty box")
    judge_ = judging(questions(4), [missing, empty])
    answered = judge(judge_, [RIGHT, RIGHT, RIGHT, ""])
    failed = replace(answered.records[3], error="too long")
    answered = judge_.judge(
        setting("gap"), {one.question_id: one for one in (*answered.records[:3], failed)}
    )
    row = judge_.row(answered, unpruned=None)
    assert (row.n, row.num_images) == (5, 3)
    assert (row.num_unusable, row.parse_failures) == (2, 0)
    assert (row.acc_at_50, row.acc_at_50_usable) == (3 / 5, 1.0)
    assert row.by_split["val"].n == 3
    assert row.by_kind["relation"].n + row.by_kind["attribute"].n == 4
    assert all(share <= 3 / 5 for share in row.other_protocols.values())
    assert judge_.compare(answered, answered).n == 5
    assert judge_.compare(answered, answered).neither == 2


def test_nothing_that_could_be_asked_has_no_accuracy_of_its_own():
    judge_ = judging(questions(2))
    row = judge_.row(judge(judge_, ["", ""], error="damaged"), unpruned=None)
    assert (row.acc_at_50, row.acc_at_50_usable, row.mean_visual_tokens) == (0, None, 0)
    assert (row.latency_ms, row.mean_batch_size, row.backend) == ({}, 0.0, "")


@pytest.mark.parametrize(("text", "hits"), [(RIGHT, 4), (WRONG, 0), ("I see no box.", 0)])
def test_the_interval_of_all_or_nothing_has_a_width(text, hits):
    judge_ = judging(questions(8))
    row = judge_.row(judge(judge_, [text] * 8), unpruned=0.0)
    assert row.ci95 == pytest.approx(wilson_interval(hits, 4))
    assert row.recovered is None


def test_the_interval_of_one_image_has_a_width():
    judge_ = judging(questions(4, per_image=4))
    row = judge_.row(judge(judge_, [RIGHT, RIGHT, RIGHT, WRONG]), unpruned=None)
    assert row.ci95[0] < row.acc_at_50 < row.ci95[1]


def test_comparisons_count_pairs():
    judge_ = judging(questions(8))
    first = judge(judge_, [RIGHT] * 5 + [WRONG] * 3, "gap")
    second = judge(judge_, [RIGHT, WRONG, WRONG, WRONG, "", RIGHT, WRONG, WRONG], "compact")
    pair = judge_.compare(first, second)
    assert (pair.first, pair.second, pair.n) == ("gap", "compact", 8)
    assert (pair.both, pair.only_first, pair.only_second, pair.neither) == (1, 4, 1, 2)
    assert pair.difference == 3 / 8
    assert pair.ci95 == paired_difference_interval(1, 4, 1, 2)
    assert pair.mcnemar_p == pytest.approx(2 * (1 + 5) / 32)


def test_latency_counts_a_batch_once():
    judge_ = judging(questions(5, per_image=3))
    times = [{"prefill": 1.0, "total": 10.0}] * 3 + [{"prefill": 3.0, "total": 20.0}] * 2
    records = {
        one.id: replace(
            record(RIGHT, WHOLE), question_id=one.id, timings_ms=time, batch_size=len(time)
        )
        for one, time in zip(judge_.questions, times, strict=True)
    }
    row = judge_.row(judge_.judge(setting("gap"), records), unpruned=None)
    assert row.latency_ms["total"] == {"median": 15.0, "p95": 19.5}
    assert row.latency_ms["prefill"]["median"] == 2.0
    assert row.mean_batch_size == 2.5


def test_tokens_are_those_of_the_answers():
    judge_ = judging(questions(2))
    answered = judge(judge_, [RIGHT, RIGHT], num_kept_tokens=7)
    assert judge_.row(answered, unpruned=None).mean_visual_tokens == 7


def test_the_gallery_holds_each_question_once_and_an_image_once_a_kind():
    judge_ = judging(questions(60))
    gap = judge(judge_, [RIGHT] * 20 + [HALF] * 20 + [WRONG] * 20, "gap")
    compact = judge(judge_, [WRONG] * 10 + [RIGHT] * 30 + [WRONG] * 20, "compact")
    items = judge_.gallery([compact, gap], compact=compact, gap=gap)
    ids = [item.question_id for item in items]
    assert len(ids) == len(set(ids))
    by_kind = {
        kind: [int(item.question_id) for item in items if item.kind == kind]
        for kind in ("best", "worst", "flipped by GAP")
    }
    # Ten were flipped, on five images.
    assert by_kind["flipped by GAP"] == [0, 2, 4, 6, 8]
    assert len(by_kind["best"]) == len(by_kind["worst"]) == GALLERY_SIZE
    assert all(place < 20 for place in by_kind["best"])
    assert all(place >= 40 for place in by_kind["worst"])
    first = items[-1].answers
    assert [answer.setting for answer in first] == ["compact", "gap"]
    assert [answer.iou for answer in first] == [0.0, 1.0]
    assert items == judge_.gallery([compact, gap], compact=compact, gap=gap)


def test_a_gallery_has_no_questions_that_could_not_be_asked():
    judge_ = judging(questions(4))
    failed = judge(judge_, [""] * 4, "gap", error="damaged")
    assert judge_.gallery([failed], compact=failed, gap=failed) == ()


def test_rows_are_plain_values_with_what_they_are_first():
    judge_ = judging(questions(4))
    plain = judge_.row(judge(judge_, [RIGHT] * 3 + [WRONG]), unpruned=0.8).to_plain()
    assert list(plain)[:9] == [
        "name", "model", "pruner", "keep_ratio", "positions", "seed", "protocol", "n", "num_images",
    ]  # fmt: skip
    assert plain["by_split"]["val"]["acc_at_50"] == 1.0
    assert plain["ci95"] == list(plain["ci95"])
