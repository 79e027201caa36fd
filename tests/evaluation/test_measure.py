"""Asking a bundle: records as a session answers, and what cannot be asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import ComputationError, UsageError
from gap_export.evaluation import measure
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.measure import (
    Runner,
    RunnerOptions,
    check_prompt,
    default_shift,
    with_prompt,
)
from gap_export.evaluation.questions import ImageSource
from gap_export.evaluation.settings import pruned_settings, whole_settings
from gap_export.evaluation.workers import Shard, cut_shards
from gap_export.runtime import answering
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import (
    GridSpec,
    PromptSpec,
    QuestionSpec,
    TextEncoderSpec,
    parse_manifest,
)

QUESTIONS = open_dataset("refshapes", samples=6, seed=0).questions


@pytest.fixture
def prompts(monkeypatch):
    """Each prompt as it is fed."""
    fed = []
    generate = answering.generate

    def record(backend, prompt, **options):
        fed.append(prompt)
        return generate(backend, prompt, **options)

    monkeypatch.setattr(answering, "generate", record)
    return fed


@pytest.fixture
def gap(tiny_bundle):
    return pruned_settings(tiny_bundle, open_bundle(tiny_bundle).manifest.pruning)[1]


def answer(setting, questions, **options):
    with Runner(RunnerOptions(**options)) as runner:
        return runner.answer(Shard(setting=setting, index=0, questions=tuple(questions)))


def without_times(records):
    return [replace(record, timings_ms={}) for record in records]


def test_records_are_what_a_session_answers(tiny_bundle, gap):
    records = answer(gap, QUESTIONS)
    assert [record.question_id for record in records] == [one.id for one in QUESTIONS]
    with GroundingSession.open(tiny_bundle) as session:
        for question, record in zip(QUESTIONS, records, strict=True):
            given = session.ground(question.image.load(), question.expression)
            assert (record.text, record.box) == (given.text, given.box)
            assert record.num_kept_tokens == len(given.keep_indices)
            assert record.num_visual_tokens == given.num_visual_tokens
            assert (record.image_size, record.error) == ((96, 96), None)
            assert record.backend == given.backend
            assert record.cut_off == any("cut off" in text for text in given.warnings)
            assert record.timings_ms.keys() == given.timings_ms.keys()
    by_image = [sum(one.image_id == q.image_id for one in QUESTIONS) for q in QUESTIONS]
    assert [record.batch_size for record in records] == by_image


def test_answers_have_boxes_with_their_fractions(gap, monkeypatch):
    monkeypatch.setattr(
        answering.PromptEncoder, "decode", lambda *_: "It is at (0.50, 0.25, 0.10, 0.75)."
    )
    (record,) = answer(gap, QUESTIONS[:1])
    assert record.fractions == (0.5, 0.25, 0.1, 0.75)
    assert record.box == pytest.approx((9.6, 24, 48, 72))


def test_what_nothing_can_be_read_from_ends_the_evaluation_and_names_the_question(gap, monkeypatch):
    monkeypatch.setattr(
        OnnxRuntimeBackend, "decode", lambda self, feed, cache: feed["inputs_embeds"][:, 0] * 0
    )
    with pytest.raises(ComputationError, match=f"logits .* asked {QUESTIONS[0].id}; allowed"):
        answer(gap, QUESTIONS)


def test_compact_and_gap_feed_the_same_tokens_with_other_positions(tiny_bundle, prompts):
    settings = pruned_settings(tiny_bundle, open_bundle(tiny_bundle).manifest.pruning)
    for setting in settings:
        answer(setting, QUESTIONS[:1])
    compact, gap = prompts
    assert np.array_equal(compact.inputs_embeds, gap.inputs_embeds)
    length = compact.id_table.shape[1]
    assert compact.id_table.tolist() == [list(range(length))]
    assert gap.id_table[0, -1] > length - 1


def test_misaligned_settings_feed_wrong_positions_and_drop_nothing(tiny_whole_bundle, prompts):
    settings = whole_settings(tiny_whole_bundle, ["none", "permuted", "shifted"])
    for setting in settings:
        answer(setting, QUESTIONS[:1], seed=3)
    unpruned, permuted, shifted = prompts
    assert np.array_equal(unpruned.id_table, permuted.id_table)
    assert not np.array_equal(unpruned.inputs_embeds, permuted.inputs_embeds)
    rows = [sorted(map(tuple, prompt.inputs_embeds[0].tolist())) for prompt in prompts]
    assert rows[0] == rows[1] == rows[2]
    moved = shifted.id_table - unpruned.id_table
    # Half a row of four.
    assert set(moved[0].tolist()) == {0, 2}
    assert np.array_equal(unpruned.inputs_embeds, shifted.inputs_embeds)


@pytest.mark.parametrize("positions", ["permuted", "shifted"])
def test_a_misalignment_of_nothing_gives_the_unpruned_answers(
    tiny_whole_bundle, prompts, monkeypatch, positions
):
    monkeypatch.setattr(measure, "default_shift", lambda grid: 0)
    monkeypatch.setattr(
        "gap_export.evaluation.settings.random_order", lambda seed, text, number: np.arange(number)
    )
    settings = whole_settings(tiny_whole_bundle, ["none", positions])
    plain, misaligned = (without_times(answer(setting, QUESTIONS)) for setting in settings)
    assert plain == misaligned
    half = len(prompts) // 2
    for one, other in zip(prompts[:half], prompts[half:], strict=True):
        assert np.array_equal(one.inputs_embeds, other.inputs_embeds)
        assert np.array_equal(one.id_table, other.id_table)


def test_what_cannot_be_asked_is_a_record_with_an_error_and_costs_no_other(gap, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG\r\n\x1a\n")
    first, second = QUESTIONS[:2]
    assert first.image_id == second.image_id
    long = replace(first, id="long", expression="the " * 10_000)
    empty = replace(first, id="empty", expression=" ")
    missing = replace(
        first, id="missing", image_id="m", image=ImageSource(path=tmp_path / "none.png")
    )
    broken = replace(first, id="broken", image_id="b", image=ImageSource(path=damaged))
    (tmp_path / "parquet").touch()
    parquet = ImageSource(parquet=(tmp_path / "parquet", 0))
    gone = replace(first, id="gone", image_id="g", image=parquet)
    records = answer(gap, [first, long, second, empty, missing, broken, gone])
    by_id = {record.question_id: record for record in records}
    failed = {name for name, record in by_id.items() if record.error is not None}
    assert failed == {"long", "empty", "missing", "broken", "gone"}
    assert "too long" in by_id["long"].error and "none.png" in by_id["missing"].error
    for name in failed:
        assert (by_id[name].text, by_id[name].box, by_id[name].fractions) == ("", None, None)
    alone = without_times(answer(gap, [first])) + without_times(answer(gap, [second]))
    assert without_times([by_id[first.id], by_id[second.id]]) == alone


def test_images_with_many_expressions_are_asked_in_batches(gap, monkeypatch):
    monkeypatch.setattr(measure, "MAX_BATCH", 3)
    questions = [replace(QUESTIONS[0], id=str(number)) for number in range(7)]
    assert [one.batch_size for one in answer(gap, questions)] == [3, 3, 3, 3, 3, 3, 1]


def test_one_bundle_is_open_at_a_time_and_each_once(tiny_bundle, tiny_whole_bundle, monkeypatch):
    from gap_export.runtime.backends import onnxruntime_backend

    events = []

    class Spy(onnxruntime_backend.OnnxRuntimeBackend):
        def __init__(self, bundle, *args, **options):
            self._bundle_name = bundle.path.name
            events.append(f"open {bundle.path.name}")
            super().__init__(bundle, *args, **options)

        def close(self):
            events.append(f"close {self._bundle_name}")
            super().close()

    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeBackend", Spy)
    settings = [
        *whole_settings(tiny_whole_bundle, ["none", "shifted"]),
        *pruned_settings(tiny_bundle, open_bundle(tiny_bundle).manifest.pruning),
    ]
    with Runner(RunnerOptions()) as runner:
        for setting in settings:
            for shard in cut_shards(setting, QUESTIONS, size=1):
                runner.answer(shard)
    whole, pruned = tiny_whole_bundle.name, tiny_bundle.name
    assert events == [f"open {whole}", f"close {whole}", f"open {pruned}", f"close {pruned}"]


def test_another_prompt_is_asked_with(gap, prompts):
    answer(gap, QUESTIONS[:1])
    answer(gap, QUESTIONS[:1], prompt="<image> USER: {expression}")
    default, other = prompts
    assert default.inputs_embeds.shape != other.inputs_embeds.shape


SPEC = PromptSpec(
    template="<image> {expression}:",
    image_token="<image>",
    max_expression_tokens=8,
    max_new_tokens=8,
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{expression}", "<image> 0 times"),
        ("<image> what?", "{expression} 0 times"),
        ("<image> {expression} {expression}", "{expression} 2 times"),
        ("{expression} <image> ", "nothing after <image>"),
        ("<image> {expression} \ud800", "half characters"),
        ("", "0 times"),
    ],
)
def test_a_prompt_without_its_places_is_refused(template, message):
    with pytest.raises(UsageError, match="the prompt cannot be used") as caught:
        check_prompt(template, SPEC)
    assert message in str(caught.value.seen)
    check_prompt("Where is {expression} in <image>?", SPEC)


@pytest.fixture
def question_manifest(sample_manifest):
    """A pruner's text tower reads the question."""
    marks = QuestionSpec(start="USER:", end="ASSISTANT:", image="<image>")
    return replace(
        sample_manifest,
        prompt=replace(sample_manifest.prompt, question=marks),
        pruning=replace(sample_manifest.pruning, pruner_text="question"),
        text_encoder=TextEncoderSpec(
            template="{expression}", tokenizer_file="tokenizer.json", max_tokens=7
        ),
    )


def test_another_prompt_is_another_question_for_the_pruner_too(question_manifest):
    asked = "USER: <image>\nWhere is {expression}? ASSISTANT:"
    found = with_prompt(question_manifest, asked)
    assert found.prompt.template == asked
    assert found.text_encoder.template == "Where is {expression}?"
    assert parse_manifest(found.to_json()) == found
    of_expressions = replace(question_manifest.pruning, pruner_text="expression")
    kept = with_prompt(replace(question_manifest, pruning=of_expressions), asked)
    assert kept.text_encoder.template == "{expression}"


def test_a_prompt_whose_question_the_pruner_cannot_find_is_refused(question_manifest):
    spec = question_manifest.prompt
    check_prompt("<image> {expression}?", spec)
    with pytest.raises(UsageError, match="the pruner reads the question, which is not found"):
        check_prompt("<image> {expression}?", spec, reads_question=True)


@pytest.mark.parametrize(("cols", "shift"), [(1, 1), (4, 2), (24, 12), (7, 3)])
def test_the_shift_is_half_a_row(cols, shift):
    assert default_shift(GridSpec(rows=3, cols=cols)) == shift


def test_a_bundle_that_is_not_there_is_refused(gap):
    with pytest.raises(UsageError, match="no bundle there"), Runner(RunnerOptions()) as runner:
        runner.session(replace(gap, bundle=Path("/nowhere/bundle")))
