"""Position maths against loops that a child could check."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.errors import UsageError
from gap_export.spec.positions import (
    VisualSpan,
    build_id_table,
    build_kept_positions,
    check_keep_ratio,
    compact_positions,
    gap_remap,
    num_kept_tokens,
    slots_from_mask,
    stack_tables,
    unpruned_ids,
)

# A prompt: text lengths around images, and for each image which of its tokens stay, in feed order.
Prompt = tuple[list[int], list[tuple[int, list[int]]]]


@st.composite
def prompts(draw: st.DrawFn, max_images: int = 3) -> Prompt:
    images = []
    for _ in range(draw(st.integers(0, max_images))):
        num = draw(st.integers(1, 12))
        keep = draw(st.lists(st.integers(0, num - 1), min_size=1, max_size=num, unique=True))
        images.append((num, keep if draw(st.booleans()) else sorted(keep)))
    texts = [draw(st.integers(0, 5)) for _ in images] + [draw(st.integers(1, 5))]
    return texts, images


def spans_of(prompt: Prompt) -> tuple[int, list[VisualSpan]]:
    texts, images = prompt
    cursor, spans = 0, []
    for text, (num, keep) in zip(texts[:-1], images, strict=True):
        cursor += text
        spans.append(
            VisualSpan(
                start=cursor, num_visual_tokens=num, keep_indices=np.asarray(keep, dtype=np.int64)
            )
        )
        cursor += num
    return cursor + texts[-1], spans


def table_by_loop(prompt: Prompt) -> list[int]:
    """Number every unpruned token, then read off the numbers of those that are fed."""
    texts, images = prompt
    table: list[int] = []
    counter = 0
    for place, text in enumerate(texts):
        for _ in range(text):
            table.append(counter)
            counter += 1
        if place < len(images):
            num, keep = images[place]
            numbers = []
            for _ in range(num):
                numbers.append(counter)
                counter += 1
            table += [numbers[index] for index in keep]
    return table


@given(prompts())
def test_kept_positions_equal_a_loop_with_any_number_of_images(prompt):
    length, spans = spans_of(prompt)
    table = build_kept_positions(unpruned_length=length, spans=spans)
    assert table.dtype == np.int64
    assert table.tolist() == table_by_loop(prompt)


@given(prompts())
def test_kept_positions_end_with_their_largest_id(prompt):
    length, spans = spans_of(prompt)
    table = build_kept_positions(unpruned_length=length, spans=spans)
    assert table[-1] == length - 1 == table.max()


@given(prompts(), st.integers(0, 3000))
def test_gap_remap_equals_a_loop_far_beyond_the_prompt(prompt, extra):
    length, spans = spans_of(prompt)
    table = build_kept_positions(unpruned_length=length, spans=spans)
    slots = np.arange(len(table) + extra, dtype=np.int64)[None]
    expected, next_id = [], length
    for slot in range(len(table) + extra):
        if slot < len(table):
            expected.append(int(table[slot]))
        else:
            expected.append(next_id)
            next_id += 1
    assert gap_remap(slots, table[None]).tolist() == [expected]


@given(st.lists(prompts(max_images=2), min_size=1, max_size=4), st.integers(0, 20))
def test_gap_remap_of_a_left_padded_stack_equals_its_rows_alone(batch, num_decoded):
    tables = []
    for prompt in batch:
        length, spans = spans_of(prompt)
        tables.append(build_kept_positions(unpruned_length=length, spans=spans))
    longest = max(map(len, tables))
    mask = np.zeros((len(batch), longest + num_decoded), dtype=np.int64)
    for row, table in zip(mask, tables, strict=True):
        row[longest - len(table) :] = 1
    ids = gap_remap(slots_from_mask(mask), stack_tables(tables))
    for row, table in zip(ids, tables, strict=True):
        alone = gap_remap(np.arange(len(table) + num_decoded)[None], table[None])[0]
        assert row[longest - len(table) :].tolist() == alone.tolist()


@given(st.integers(1, 40), st.integers(0, 40))
def test_gap_remap_of_a_compact_table_changes_nothing(length, extra):
    slots = np.arange(length + extra, dtype=np.int64)[None]
    assert gap_remap(slots, compact_positions(length)[None]).tolist() == slots.tolist()


def test_gap_remap_on_llava_1_5_decodes_from_the_unpruned_length():
    keep = np.linspace(0, 575, 173).astype(np.int64)
    span = VisualSpan(start=35, num_visual_tokens=576, keep_indices=keep)
    table = build_kept_positions(unpruned_length=35 + 576 + 24, spans=[span])
    assert len(table) == 232
    assert gap_remap(np.asarray([[231, 232, 233]]), table[None]).tolist() == [[634, 635, 636]]


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_slots_equal_a_loop_for_any_mask(rows):
    expected = []
    for row in rows:
        counter, slots = -1, []
        for token in row:
            counter += token
            slots.append(max(counter, 0))
        expected.append(slots)
    assert slots_from_mask(np.asarray(rows)).tolist() == expected


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 4096))
def test_num_kept_tokens_rounds_half_up_within_1_and_n(keep_ratio, num):
    kept = num_kept_tokens(keep_ratio, num)
    assert 1 <= kept <= num
    assert abs(kept - keep_ratio * num) <= 0.5 or kept == 1


@pytest.mark.parametrize(
    ("keep_ratio", "num", "kept"),
    [(0.3, 144, 43), (0.3, 576, 173), (0.5, 5, 3), (0.5, 7, 4), (1e-9, 144, 1), (1.0, 144, 144)],
)
def test_num_kept_tokens_at_known_points(keep_ratio, num, kept):
    assert num_kept_tokens(keep_ratio, num) == kept


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.0000001, 30, math.nan, math.inf, -math.inf])
def test_keep_ratio_outside_its_range_is_refused(keep_ratio):
    with pytest.raises(UsageError, match=r"keep ratio out of range.*0 < keep <= 1"):
        check_keep_ratio(keep_ratio)
    with pytest.raises(UsageError, match="keep ratio"):
        num_kept_tokens(keep_ratio, 10)


def test_no_visual_tokens_are_refused():
    with pytest.raises(UsageError, match="at least one visual token: 0"):
        num_kept_tokens(0.5, 0)


def _span(start: int, num: int, keep: Any) -> VisualSpan:
    return VisualSpan(start=start, num_visual_tokens=num, keep_indices=np.asarray(keep))


@pytest.mark.parametrize(
    ("length", "spans", "message"),
    [
        (10, [_span(2, 9, [0])], r"does not fit the prompt: tokens 2\.\.10"),
        (10, [_span(-1, 3, [0])], "does not fit the prompt"),
        (20, [_span(2, 5, [0]), _span(6, 5, [0])], "after the span before it"),
        (10, [_span(2, 5, [5])], r"keep_indices out of range: 5\.\.5; allowed: 0\.\.4"),
        (10, [_span(2, 5, [-1, 2])], "keep_indices out of range"),
        (10, [_span(2, 5, np.empty(0, np.int64))], "non-empty vector"),
        (10, [_span(2, 5, [[1]])], "non-empty vector"),
        (7, [_span(2, 5, [1])], "must end with a token that is not visual"),
        (0, [], "must end with a token that is not visual"),
    ],
)
def test_kept_positions_refuse_spans_that_do_not_fit(length, spans, message):
    with pytest.raises(UsageError, match=message):
        build_kept_positions(unpruned_length=length, spans=spans)


@pytest.mark.parametrize("rows", [[], [np.empty(0, np.int64)], [np.zeros((1, 1, 2), np.int64)]])
def test_stacking_refuses_what_is_not_a_list_of_tables(rows):
    with pytest.raises(UsageError, match="non-empty, one a row"):
        stack_tables(rows)


@pytest.mark.parametrize(
    ("position_ids", "kept_positions", "message"),
    [
        (np.zeros(3, np.int64), np.zeros((1, 3), np.int64), "a matrix of slots and a table of ids"),
        (np.zeros((2, 3), np.int64), np.zeros((1, 3), np.int64), "same B"),
        (np.zeros((1, 3), np.int64), np.zeros((1, 0), np.int64), "P >= 1"),
        (np.full((1, 3), -1), np.zeros((1, 3), np.int64), "never negative: -1"),
    ],
)
def test_gap_remap_refuses_shapes_that_do_not_fit(position_ids, kept_positions, message):
    with pytest.raises(UsageError, match=message):
        gap_remap(position_ids, kept_positions)


def mrope_span(start: int, grid: tuple[int, int], keep: Any = (0,)) -> VisualSpan:
    return VisualSpan(
        start=start,
        num_visual_tokens=grid[0] * grid[1],
        keep_indices=np.asarray(keep),
        grid=grid,
    )


def mrope_by_loop(length: int, spans: list[VisualSpan]) -> list[list[int]]:
    """[L, 3], token by token."""
    starts = {span.start: span.grid or (0, 0) for span in spans}
    ids: list[list[int]] = []
    counter = 0
    while len(ids) < length:
        if len(ids) in starts:
            rows, cols = starts[len(ids)]
            ids += [[counter, counter + r, counter + c] for r in range(rows) for c in range(cols)]
            counter += max(rows, cols)
        else:
            ids.append([counter] * 3)
            counter += 1
    return ids


@st.composite
def mrope_prompts(draw: st.DrawFn) -> tuple[int, list[VisualSpan]]:
    cursor, spans = 0, []
    for _ in range(draw(st.integers(0, 3))):
        cursor += draw(st.integers(1, 5))
        grid = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
        tokens = st.sets(st.integers(0, grid[0] * grid[1] - 1), min_size=1)
        spans.append(mrope_span(cursor, grid, sorted(draw(tokens))))
        cursor += grid[0] * grid[1]
    return cursor + draw(st.integers(1, 5)), spans


# Importing transformers takes its time.
@settings(deadline=None, max_examples=50)
@given(mrope_prompts())
def test_three_axes_equal_a_loop_and_what_transformers_gives(prompt):
    length, spans = prompt
    ids = unpruned_ids(length, spans, position_axes=3)
    assert ids.T.tolist() == mrope_by_loop(length, spans)
    kinds = np.zeros((1, length), dtype=np.int64)
    for span in spans:
        kinds[0, span.start : span.start + span.num_visual_tokens] = 1
    grids = [[1, 2 * (span.grid or (0, 0))[0], 2 * (span.grid or (0, 0))[1]] for span in spans]
    for theirs, delta in rope_index(kinds, grids):
        assert np.array_equal(ids, theirs)
        assert delta == ids.max() + 1 - length


def rope_index(kinds: np.ndarray, grids: list[list[int]]) -> list[tuple[np.ndarray, int]]:
    """What Qwen2.5-VL and Qwen3-VL of transformers say; nothing where that is not installed."""
    try:
        import torch
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
    except ImportError:
        return []
    found = []
    for model in (Qwen2_5_VLModel, Qwen3VLModel):
        vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
        this = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
        this.get_vision_position_ids = model.get_vision_position_ids.__get__(this)
        ids, delta = model.get_rope_index(
            this,
            input_ids=torch.from_numpy(kinds),
            mm_token_type_ids=torch.from_numpy(kinds),
            image_grid_thw=torch.tensor(grids).reshape(-1, 3),
        )
        found.append((ids[:, 0].numpy(), int(delta)))
    return found


def test_three_axes_of_a_small_prompt_are_the_published_ones():
    ids = unpruned_ids(19, [mrope_span(3, (3, 4))], position_axes=3)
    assert [" ".join(map(str, axis)) for axis in ids.tolist()] == [
        "0 1 2 3 3 3 3 3 3 3 3 3 3 3 3 7 8 9 10",
        "0 1 2 3 3 3 3 4 4 4 4 5 5 5 5 7 8 9 10",
        "0 1 2 3 4 5 6 3 4 5 6 3 4 5 6 7 8 9 10",
    ]
    # Qwen2.5-VL, 640x480.
    ids = unpruned_ids(426, [mrope_span(15, (17, 23))], position_axes=3)
    assert (ids[:, 406].tolist(), ids[:, -1].tolist()) == ([38] * 3, [57] * 3)


@given(mrope_prompts(), st.integers(0, 9))
def test_a_table_of_three_axes_is_a_choice_of_columns_and_goes_on_at_the_largest(prompt, extra):
    length, spans = prompt
    kept = build_kept_positions(unpruned_length=length, spans=spans)
    table = build_id_table(kept, unpruned_length=length, spans=spans, position_axes=3)
    ids = mrope_by_loop(length, spans)
    assert table.T.tolist() == [ids[index] for index in kept]
    slots = np.arange(len(kept) + extra)[None]
    found = gap_remap(slots, stack_tables([table]))[:, 0]
    largest = max(map(max, ids))
    more = [[largest + 1 + step] * 3 for step in range(extra)]
    assert found.T.tolist() == table.T.tolist() + more


def test_tables_of_three_axes_are_stacked_and_continued_on_each_axis():
    tables = []
    for length, grid, keep in ((9, (2, 3), [1, 4]), (13, (3, 3), list(range(9)))):
        span = mrope_span(2, grid, keep)
        kept = build_kept_positions(unpruned_length=length, spans=[span])
        tables.append(build_id_table(kept, unpruned_length=length, spans=[span], position_axes=3))
    stacked = stack_tables(tables)
    assert stacked.shape == (3, 2, 13)
    assert stacked[:, 0].tolist() == [
        [0, 1, 2, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13],
        [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13],
        [0, 1, 3, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13],
    ]
    with pytest.raises(UsageError, match="differ in their axes"):
        stack_tables([tables[0], tables[1][0]])


@pytest.mark.parametrize(
    ("rule", "keep", "last_axis"),
    [
        ("compact", [0, 2, 4], [0, 1, 2, 3, 4, 5, 6]),
        # 3 columns: of the last one a token is left, so text goes on where it would.
        ("text-shifted", [0, 2, 4], [0, 1, 2, 4, 3, 5, 6]),
        # And here none is.
        ("text-shifted", [0, 3], [0, 1, 2, 2, 4, 5]),
        ("gap", [0, 3], [0, 1, 2, 2, 5, 6]),
    ],
)
def test_baselines_of_three_axes(rule, keep, last_axis):
    span = mrope_span(2, (2, 3), keep)
    kept = build_kept_positions(unpruned_length=10, spans=[span])
    table = build_id_table(kept, unpruned_length=10, spans=[span], position_axes=3, rule=rule)
    assert table[2].tolist() == last_axis


@pytest.mark.parametrize("rule", ["gap", "compact", "text-shifted"])
def test_with_one_axis_an_id_is_an_index_but_for_the_baselines(rule):
    span = VisualSpan(start=2, num_visual_tokens=6, keep_indices=np.array([1, 4]))
    kept = build_kept_positions(unpruned_length=10, spans=[span])
    table = build_id_table(kept, unpruned_length=10, spans=[span], rule=rule)
    assert (
        table.tolist()
        == {
            "gap": kept.tolist(),
            "compact": [0, 1, 2, 3, 4, 5],
            "text-shifted": [0, 1, 3, 6, 7, 8],
        }[rule]
    )


@pytest.mark.parametrize(
    ("axes", "grid", "message"),
    [
        (2, (2, 3), "no such number of position axes: 2; allowed: 1 or 3"),
        (3, None, "no grid to take its position ids from: 6 visual tokens, grid None"),
        (3, (2, 4), r"no grid .*: 6 visual tokens, grid \(2, 4\)"),
    ],
)
def test_axes_without_ids_are_refused(axes, grid, message):
    span = VisualSpan(start=2, num_visual_tokens=6, keep_indices=np.array([1]), grid=grid)
    with pytest.raises(UsageError, match=message):
        unpruned_ids(10, [span], position_axes=axes)
