"""What prompts begin with, computed once: the answers are those of each prompt alone."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

from gap_export.errors import ExpressionError, GapExportError, UsageError
from gap_export.runtime.byte_store import ByteStore
from gap_export.runtime.generation import assemble_prompt, generate
from gap_export.runtime.session import GroundingSession
from gap_export.runtime.shared_prefix import choose_length, common_length, find_prefix
from tests.runtime.test_generation import ROWS, make_row

EXPRESSIONS = ["the star", "the small red circle above the star", "blue square", "the star"]


@pytest.fixture
def manifest(request, sample_manifest) -> Any:
    """That of the test's parameter ``kind``."""
    kind = request.getfixturevalue("kind")
    return request.getfixturevalue(f"{kind}_manifest") if kind else sample_manifest


def prefills(session: GroundingSession) -> list[tuple[int, ...]]:
    """Shapes [B, S] of what the decoder is fed at once, from now on."""
    seen: list[tuple[int, ...]] = []
    honest: Any = session.backend.decode

    def decode(feed: Any, cache: Any) -> Any:
        if feed["inputs_embeds"].shape[1] > 1 or not cache.length:
            seen.append(feed["inputs_embeds"].shape[:2])
        return honest(feed, cache)

    session.backend.decode = decode  # type: ignore[method-assign]
    return seen


def facts(answers: Any) -> list[Any]:
    return [
        dataclasses.replace(answer, timings_ms={}, warnings=tuple(sorted(answer.warnings)))
        for answer in answers
    ]


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *((kind, "plain") for kind in ("", "text", "tiled", "tiled_text")),
        ("", "proportional"),
        ("tiled_text", "proportional"),
    ],
)
@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_a_view_answers_as_separate_calls_do(
    make_session, manifest, image, kind, kept_bytes, attention
):
    pruning = dataclasses.replace(manifest.pruning, attention=attention)
    session = make_session(dataclasses.replace(manifest, pruning=pruning), kept_bytes=kept_bytes)
    alone = facts(session.ground(image, expression) for expression in EXPRESSIONS)
    assert len({answer.token_ids for answer in alone}) > 1
    with session.look(image) as view:
        assert facts(view.ground(expression) for expression in EXPRESSIONS) == alone
        assert facts(view.ground_batch(EXPRESSIONS)) == alone
    assert facts(session.ground_batch(image, EXPRESSIONS)) == alone
    assert session.backend.continues_prompts


@pytest.mark.parametrize("positions", ["gap", "compact", "text-shifted"])
def test_rows_go_on_from_what_they_share(sample_manifest, make_backend, positions):
    first = ROWS[0]
    shorter = dataclasses.replace(first, suffix_embeds=make_row(0, 2, [0]).suffix_embeds)
    rows = [first, shorter]

    def run(rows: Any, shared: int) -> Any:
        backend = make_backend(sample_manifest)
        prompt = assemble_prompt(rows, positions=positions, num_shared=shared)
        prefix = find_prefix(backend, prompt, None, sample_manifest.decoder) if shared else None
        return generate(
            backend, prompt, max_new_tokens=6, eos_token_ids=(), prefix=prefix, keep_logits=True
        )

    for shared in range(1, common_length(rows) + 1):
        together = run(rows, shared)
        for index, row in enumerate(rows):
            alone = run([row], 0)
            assert together.token_ids[index] == alone.token_ids[0]
            np.testing.assert_allclose(together.logits[index], alone.logits[0], atol=1e-5)


def test_what_rows_have_in_common_ends_with_the_first_difference(sample_manifest, make_backend):
    first = ROWS[0]
    other_feature = first.image_features.copy()
    other_feature[2] += 1
    for changes, common in (
        ({}, 6),
        ({"suffix_embeds": first.suffix_embeds[1:]}, 6),
        ({"image_features": other_feature}, 4),
        ({"keep_indices": np.array([0, 4, 9, 15])}, 3),
        ({"prefix_embeds": first.prefix_embeds[:1]}, 1),
        ({"prefix_embeds": first.prefix_embeds + 1}, 0),
        ({"shift": 1}, 2),
        ({"grid": (4, 4)}, 2),
        ({"counts": np.array([4, 4, 4, 4])}, 2),
    ):
        assert common_length([first, dataclasses.replace(first, **changes)]) == common
    backend = make_backend(sample_manifest)
    # 5 further rows of 6 tokens are not worth another reading of the weights; 6 are.
    assert [choose_length([first] * n, backend, None) for n in (1, 6, 7)] == [0, 0, 6]
    backend.continues_prompts = False
    assert choose_length([first] * 7, backend, None) == 0


@pytest.mark.parametrize("kind", ["", "text"])
def test_the_image_goes_in_once_for_all_questions_of_its_views(make_session, manifest, image, kind):
    session = make_session(manifest)
    seen = prefills(session)
    prefix = 2 if kind else 7
    with session.look(image) as view:
        for expression in EXPRESSIONS[:2]:
            view.ground(expression)
    with session.look(image.copy()) as again:
        again.ground_batch(EXPRESSIONS[2:])
    rests = [session._prompts.encode(words).suffix_ids.size for words in EXPRESSIONS]
    rests = [rest + 7 - prefix for rest in rests]
    assert seen == [(1, prefix), (1, rests[0]), (1, rests[1]), (2, max(rests[2:]))]
    backend: Any = session.backend
    assert backend.calls.count("vision_encoder") == (3 if kind else 1)
    with session.look(255 - image) as other:
        other.ground("the star")
    # What stands before the image is the same for every image.
    assert seen[4:] == [(1, rests[0])] if kind else [(1, prefix), (1, rests[0])]


def test_questions_of_one_call_share_the_image(make_session, sample_manifest, image):
    session = make_session(sample_manifest)
    seen = prefills(session)
    session.ground_batch(image, EXPRESSIONS * 2)
    assert seen[0] == (1, 7) and seen[1][0] == 8
    assert session._store.num_bytes == 0
    session.ground(image, "the star")
    assert len(seen) == 3


def test_timings_name_the_stages_that_ran(make_session, sample_manifest, image):
    session = make_session(sample_manifest)
    with session.look(image) as view:
        first, next_one = view.ground("the star"), view.ground("blue square")
    assert "vision_encoder" in first.timings_ms and "vision_encoder" not in next_one.timings_ms
    assert list(next_one.timings_ms) == [
        "preprocess", "embed_tokens", "prefill", "decode", "total",
    ]  # fmt: skip


def test_an_experiment_on_rows_is_never_kept(make_session, sample_manifest, image):
    def edit(expression: str, row: Any) -> Any:
        order = slice(None, None, -1 if "star" in expression else 1)
        return dataclasses.replace(row, image_features=row.image_features[order])

    session = make_session(sample_manifest, edit_row=edit)
    alone = [session.ground(image, words).token_ids for words in EXPRESSIONS]
    with session.look(image) as view:
        assert [view.ground(words).token_ids for words in EXPRESSIONS] == alone


def test_closed_views_and_sessions_answer_nothing(make_session, sample_manifest, image):
    session = make_session(sample_manifest)
    with session.look(image) as view:
        with pytest.raises(ExpressionError, match="no list of expressions"):
            view.ground_batch([])
        with pytest.raises(ExpressionError, match="empty"):
            view.ground(" ")
        view.ground("the star")
    with pytest.raises(GapExportError, match="the view is closed"):
        view.ground("the star")
    open_view = session.look(image)
    session.close()
    assert session._store.num_bytes == 0
    with pytest.raises(GapExportError, match="the session is closed"):
        open_view.ground("the star")
    with pytest.raises(GapExportError, match="the session is closed"):
        session.look(image)


@pytest.mark.parametrize("size", [-1, 1.5, True, "1 GB", None])
def test_what_is_no_size_is_refused(make_session, sample_manifest, size):
    with pytest.raises(UsageError, match="kept_bytes is no size in bytes"):
        make_session(sample_manifest, kept_bytes=size)


def test_the_store_forgets_what_was_not_used_for_longest():
    store = ByteStore(10, what="size")
    for key in "abc":
        store.put(key, key.upper(), 3)
    assert store.get("a") == "A"
    store.put("d", "D", 4)
    assert [store.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    store.put("a", "A'", 1)
    assert (store.get("a"), store.num_bytes) == ("A'", 8)
    store.put("larger than the store", "E", 11)
    assert store.num_bytes == 8 and store.get("larger than the store") is None
    store.put("f", "F", 10)
    assert [store.get(key) for key in "acdf"] == [None, None, None, "F"]
    assert not ByteStore(0, what="size").has_room(1)


def test_threads_share_a_view(make_session, sample_manifest, image):
    session = make_session(sample_manifest)
    alone = [session.ground(image, words).token_ids for words in EXPRESSIONS]
    found: dict[int, Any] = {}
    with session.look(image) as view:

        def ask(number: int) -> None:
            found[number] = view.ground(EXPRESSIONS[number]).token_ids

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert [found[number] for number in range(4)] == alone
