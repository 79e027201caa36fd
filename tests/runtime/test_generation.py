"""The prompt's assembly and the greedy loop, on a backend in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gap_export.errors import UsageError
from gap_export.runtime.backends.backend import Backend
from gap_export.runtime.generation import DecoderPrompt, PromptRow, assemble_prompt, generate
from gap_export.spec.manifest import Manifest

MakeBackend = Callable[[Manifest], Any]
HIDDEN, NUM_VISUAL = 8, 16


def make_row(
    prefix: int, suffix: int, keep: list[int], *, seed: int = 0, num_visual: int = NUM_VISUAL
) -> PromptRow:
    rng = np.random.default_rng(seed)
    return PromptRow(
        prefix_embeds=rng.normal(size=(prefix, HIDDEN)).astype(np.float32),
        suffix_embeds=rng.normal(size=(suffix, HIDDEN)).astype(np.float32),
        image_features=rng.normal(size=(len(keep), HIDDEN)).astype(np.float32),
        keep_indices=np.asarray(keep, dtype=np.int64),
        num_visual_tokens=num_visual,
    )


ROWS = [
    make_row(2, 5, [0, 3, 9, 15], seed=1),
    make_row(2, 1, [1, 2, 3, 4], seed=2),
    make_row(0, 3, [5, 6, 7, 8], seed=3),
]


def assembled(rows: list[PromptRow], positions: Any = "gap") -> DecoderPrompt:
    return assemble_prompt(rows, positions=positions)


def test_one_row_is_prefix_image_suffix_with_original_ids():
    row = ROWS[0]
    prompt = assembled([row])
    expected = [*row.prefix_embeds, *row.image_features, *row.suffix_embeds]
    assert (prompt.inputs_embeds[0] == np.stack(expected)).all()
    assert prompt.attention_mask.tolist() == [[1] * 11]
    assert prompt.position_ids.tolist() == [list(range(11))]
    assert prompt.kept_positions.tolist() == [[0, 1, 2, 5, 11, 17, 18, 19, 20, 21, 22]]


def test_compact_positions_are_the_slots():
    prompt = assembled([ROWS[0]], "compact")
    assert prompt.id_table.tolist() == [list(range(11))]
    assert prompt.kept_positions.tolist() == [[0, 1, 2, 5, 11, 17, 18, 19, 20, 21, 22]]


def test_shorter_rows_are_padded_on_the_left():
    prompt = assembled(ROWS)
    assert prompt.attention_mask.sum(axis=1).tolist() == [11, 7, 7]
    assert prompt.attention_mask[1].tolist() == [0] * 4 + [1] * 7
    assert not prompt.inputs_embeds[1, :4].any()
    assert prompt.position_ids[1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert prompt.kept_positions[1].tolist() == [0, 1, 3, 4, 5, 6, 18, 19, 20, 21, 22]


def test_rows_may_differ_in_how_many_visual_tokens_there_were():
    rows = [make_row(2, 2, [0, 3], num_visual=4), make_row(2, 2, [0, 3, 8], num_visual=9)]
    prompt = assembled(rows)
    # The shorter table goes on by itself.
    assert prompt.kept_positions.tolist() == [[0, 1, 2, 5, 6, 7, 8], [0, 1, 2, 5, 10, 11, 12]]


def test_what_visual_tokens_count_as_stands_at_their_slots():
    rows = [
        replace(ROWS[0], counts=np.array([4, 3, 5, 4])),
        replace(ROWS[1], counts=np.array([16, 1, 2, 3])),
        ROWS[2],
    ]
    prompt, plain = assembled(rows), assembled(ROWS)
    assert prompt.attention_mask[0].tolist() == [1, 1, 4, 3, 5, 4, 1, 1, 1, 1, 1]
    assert prompt.attention_mask[1].tolist() == [0, 0, 0, 0, 1, 1, 16, 1, 2, 3, 1]
    assert (prompt.attention_mask[2] == plain.attention_mask[2]).all()
    assert (prompt.position_ids == plain.position_ids).all()
    assert (prompt.id_table == plain.id_table).all()
    # Padding stands behind what is shared.
    shared = assemble_prompt(
        [rows[0], replace(rows[0], suffix_embeds=ROWS[1].suffix_embeds)],
        positions="gap",
        num_shared=4,
    )
    assert shared.attention_mask[1].tolist() == [1, 1, 4, 3, 0, 0, 0, 0, 5, 4, 1]
    assert shared.shared_feed["attention_mask"].tolist() == [[1, 1, 4, 3]]


def test_no_rows_are_refused():
    with pytest.raises(UsageError, match="at least one row"):
        assembled([])


@pytest.mark.parametrize("positions", ["gap", "compact"])
def test_rows_of_a_batch_equal_the_rows_alone(sample_manifest, make_backend, positions):
    def run(rows: list[PromptRow]) -> Any:
        backend = make_backend(sample_manifest)
        return generate(
            backend, assembled(rows, positions),
            max_new_tokens=6, eos_token_ids=(), keep_logits=True,
        )  # fmt: skip

    together = run(ROWS)
    for index, row in enumerate(ROWS):
        alone = run([row])
        assert together.token_ids[index] == alone.token_ids[0]
        np.testing.assert_allclose(together.logits[index], alone.logits[0], rtol=1e-5, atol=1e-5)


def test_decode_goes_on_from_the_unpruned_length(sample_manifest, make_backend):
    backend = make_backend(sample_manifest)
    generate(backend, assembled(ROWS), max_new_tokens=4, eos_token_ids=())
    # Unpruned lengths: 2+16+5, 2+16+1, 0+16+3.
    assert [ids[:, 0].tolist() for ids in backend.ids_seen[1:]] == [
        [23, 19, 19], [24, 20, 20], [25, 21, 21],
    ]  # fmt: skip


class ScriptedBackend(Backend):
    """Says what it is told, row by row, and remembers what it was fed."""

    def __init__(self, answers: list[list[int]], vocab_size: int = 9) -> None:
        self.answers = np.asarray(answers)
        self.vocab_size = vocab_size
        self.fed: list[list[int]] = []
        self.masks: list[list[int]] = []
        self.step = 0

    def new_cache(self, batch_size: int, num_slots: int) -> Any:
        return batch_size, num_slots

    def fork_cache(self, cache: Any, batch_size: int, num_slots: int) -> Any:
        return batch_size, num_slots

    def run(self, component: str, feed: Any) -> Any:
        assert component == "embed_tokens"
        ids = feed["input_ids"]
        self.fed.append(ids[:, 0].tolist())
        return {"inputs_embeds": np.zeros((*ids.shape, HIDDEN), np.float32)}

    def decode(self, feed: Any, cache: Any) -> Any:
        self.masks.append(list(feed["attention_mask"].shape))
        logits = np.zeros((len(self.answers), self.vocab_size), np.float32)
        logits[np.arange(len(self.answers)), self.answers[:, self.step]] = 1.0
        self.step += 1
        return logits


def scripted(answers: list[list[int]], **options: Any) -> tuple[ScriptedBackend, Any]:
    backend = ScriptedBackend(answers)
    rows = [make_row(1, 1, [0]) for _ in answers]
    given_options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_ids": (2,), **options}
    return backend, generate(backend, assembled(rows), **given_options)  # type: ignore[arg-type]


def test_rows_end_at_their_own_eos_and_the_loop_at_the_last():
    backend, found = scripted([[5, 2, 7, 7, 7], [5, 6, 4, 2, 7], [2, 2, 2, 2, 2]])
    assert found.token_ids == ((5, 2), (5, 6, 4, 2), (2,))
    assert backend.step == 4
    assert [shape[1] for shape in backend.masks] == [3, 4, 5, 6]


def test_any_of_several_eos_ends_a_row():
    _, found = scripted([[5, 8, 7, 7, 7]], eos_token_ids=(2, 8))
    assert found.token_ids == ((5, 8),)


def test_answer_without_eos_ends_at_the_limit_without_an_extra_step():
    backend, found = scripted([[5, 5, 5, 5, 5, 5]], max_new_tokens=3)
    assert found.token_ids == ((5, 5, 5),)
    assert backend.step == 3
    assert backend.fed == [[5], [5]]


def test_forced_tokens_are_fed_and_the_choices_reported():
    forced = np.asarray([[1, 3, 4, 1]])
    backend, found = scripted([[5, 2, 7, 6, 5]], forced_tokens=forced, keep_logits=True)
    assert backend.fed == [[1], [3], [4]]
    assert found.token_ids == ((5, 2, 7, 6),)
    assert found.logits.shape == (1, 4, 9)
    assert found.logits.argmax(axis=-1).tolist() == [[5, 2, 7, 6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "nothing to generate"),
        ({"forced_tokens": np.zeros((1, 0), np.int64)}, "nothing to generate"),
        ({"forced_tokens": np.zeros((2, 3), np.int64)}, "another batch size: 2; allowed: 1"),
    ],
)
def test_request_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        scripted([[5]], **options)
