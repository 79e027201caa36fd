"""What the command tree says itself."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("option", "value"), [("--dtype", "int8"), ("--order", "worst"), ("--positions", "none")]
)
def test_a_value_outside_a_choice_is_refused_in_plain_words(run_cli, option, value):
    outcome = run_cli("demo", option, value)
    assert outcome.code == 2
    assert f"Invalid value for '{option}': '{value}' is not one of" in outcome.err


def test_a_bundle_in_place_of_a_model_is_called_one(run_cli, tiny_bundle):
    outcome = run_cli(tiny_bundle)
    assert (outcome.code, outcome.out) == (2, "")
    assert "this is a bundle" in outcome.err
    assert "gap-export check, ground, eval, inspect" in outcome.err


@pytest.mark.parametrize("word", ["serve", "bench", "plan", "calibrate", "server"])
def test_an_unknown_command_is_not_taken_for_a_model(run_cli, word):
    outcome = run_cli(word, "bundle", "--device", "orin")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"there is no command and no model of that name: {word};" in outcome.err
    assert "a command: export, patch, build, check" in outcome.err
