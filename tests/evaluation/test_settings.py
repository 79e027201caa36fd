"""Settings and misalignments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gap_export.evaluation import settings
from gap_export.evaluation.measure import edit_of
from gap_export.evaluation.settings import (
    Misalignment,
    Setting,
    count_as_one,
    describe_attention,
    describe_positions,
    pruned_settings,
    random_order,
    whole_arms,
    whole_settings,
)
from gap_export.runtime.generation import PromptRow, assemble_prompt


def setting(name):
    return Setting(
        name=name, bundle=Path("b"), pruner="cls", keep_ratio=0.3, positions="gap", backend=None
    )


def row(**changes):
    """Three visual tokens between two words and one, all of them kept."""
    rng = np.random.default_rng(0)
    prefix, image, suffix = (rng.normal(size=(n, 4)).astype(np.float32) for n in (2, 3, 1))
    plain = PromptRow(
        prefix_embeds=prefix,
        suffix_embeds=suffix,
        image_features=image,
        keep_indices=np.arange(3),
        num_visual_tokens=3,
    )
    return replace(plain, **changes)


def test_slugs_are_names_of_files_and_differ_where_names_do():
    assert setting("spatial keep 0.3 gap").slug == "spatial-keep-0.3-gap"
    names = ["a b", "a/b", "a:b", "../a b", "a-b keep", "a  b"]
    slugs = [setting(name).slug for name in names]
    assert len(set(slugs)) == len(names)
    assert not any(set(slug) & set("/: ") or slug in {".", ".."} for slug in slugs)


def test_a_pruned_bundle_has_a_compact_and_a_gap_setting(sample_manifest):
    pruning = replace(sample_manifest.pruning, keep_ratio=0.3)
    compact, gap = pruned_settings(Path("b"), pruning)
    assert (compact.name, gap.name) == ("spatial keep 0.3 compact", "spatial keep 0.3 gap")
    assert (compact.positions, gap.positions) == ("compact", "gap")
    assert replace(compact, name=gap.name, positions="gap") == gap


def test_on_three_axes_text_shifted_is_an_arm_and_compact_is_asked_with_nothing_dropped(
    sample_manifest,
):
    arms = pruned_settings(Path("b"), sample_manifest.pruning, position_axes=3)
    assert [one.positions for one in arms] == ["compact", "text-shifted", "gap"]
    assert [one.rule for one in arms] == ["compact", "text-shifted", "gap"]
    whole = whole_settings(Path("b"), whole_arms(3))
    assert [(one.name, one.pruner, one.rule) for one in whole] == [
        ("unpruned", "none", "gap"),
        ("unpruned compact", "none", "compact"),
    ]
    assert whole_arms(1) == ("none",) and describe_positions(1) == {}
    (shifted,) = whole_settings(Path("b"), ["shifted"])
    assert shifted.rule == "gap"


def test_keep_ratios_that_are_nearly_the_same_have_names_of_their_own(sample_manifest):
    names = {
        pruned_settings(Path("b"), replace(sample_manifest.pruning, keep_ratio=keep))[0].name
        for keep in (0.3, 0.30000001, 0.1 + 0.2)
    }
    assert len(names) == 3


def test_an_unpruned_bundle_runs_in_onnx_runtime_whatever_the_pruned_one_does():
    unpruned, shifted = whole_settings(Path("b"), ["none", "shifted"])
    assert (unpruned.name, unpruned.positions, unpruned.pruner) == ("unpruned", "none", "none")
    assert (shifted.name, shifted.positions, shifted.keep_ratio) == ("shifted", "shifted", 1.0)
    assert {unpruned.backend, shifted.backend} == {"onnxruntime"}


def test_shifted_moves_every_id_from_the_first_visual_token_on():
    edited = Misalignment(kind="shifted", shift=5).edit("the cup", row())
    prompt = assemble_prompt([edited], positions="gap")
    assert prompt.id_table.tolist() == [[0, 1, 7, 8, 9, 10]]
    plain = assemble_prompt([row()], positions="gap")
    assert np.array_equal(prompt.inputs_embeds, plain.inputs_embeds)


def test_permuted_gives_ids_by_the_order_of_input():
    edited = Misalignment(kind="permuted", seed=3).edit("the cup", row())
    order = random_order(3, "the cup", 3)
    prompt, plain = (assemble_prompt([one], positions="gap") for one in (edited, row()))
    assert np.array_equal(prompt.id_table, plain.id_table)
    assert np.array_equal(prompt.inputs_embeds[0, 2:5], plain.inputs_embeds[0, 2:5][order])
    assert np.array_equal(prompt.inputs_embeds[0, :2], plain.inputs_embeds[0, :2])
    assert np.array_equal(prompt.inputs_embeds[0, 5:], plain.inputs_embeds[0, 5:])


def test_no_shift_and_the_order_there_was_change_nothing(monkeypatch):
    monkeypatch.setattr(settings, "random_order", lambda seed, text, number: np.arange(number))
    shifted = Misalignment(kind="shifted", shift=0).edit("the cup", row())
    permuted = Misalignment(kind="permuted").edit("the cup", row())
    plain = assemble_prompt([row()], positions="gap")
    for edited in (shifted, permuted):
        prompt = assemble_prompt([edited], positions="gap")
        assert np.array_equal(prompt.inputs_embeds, plain.inputs_embeds)
        assert np.array_equal(prompt.id_table, plain.id_table)


def test_random_orders_are_the_same_everywhere():
    assert random_order(0, "the cup", 6).tolist() == [3, 4, 1, 5, 2, 0]


@pytest.mark.parametrize("other", [(1, "the cup"), (0, "the cap")])
def test_random_orders_depend_on_seed_and_expression(other):
    assert sorted(random_order(*other, 64)) == list(range(64))
    assert not np.array_equal(random_order(*other, 64), random_order(0, "the cup", 64))


def test_what_is_done_is_told_with_its_amount():
    assert "6 higher" in Misalignment(kind="shifted", shift=6).describe()
    assert "seed 4" in Misalignment(kind="permuted", seed=4).describe()


def test_a_bundle_of_proportional_attention_is_asked_without_it_too(sample_manifest):
    pruning = replace(sample_manifest.pruning, attention="proportional")
    settings = pruned_settings(Path("b"), pruning)
    assert [one.positions for one in settings] == ["compact", "gap", "gap+proportional"]
    assert [one.rule for one in settings] == ["compact", "gap", "gap"]
    assert len({one.slug for one in settings}) == 3
    manifest = replace(sample_manifest, pruning=pruning)
    edits = [edit_of(one, manifest, seed=0) for one in settings]
    assert edits == [count_as_one, count_as_one, None]
    assert list(describe_attention(settings)) == ["gap+proportional"]
    assert describe_attention(settings[:2]) == {}
    plain = pruned_settings(Path("b"), sample_manifest.pruning)[-1]
    assert edit_of(plain, sample_manifest, seed=0) is None
