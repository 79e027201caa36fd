"""``gap-export check``."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gap_export.parity import check as parity_check
from gap_export.parity.check import OutputParity, ParityReport


def report(*, passed: bool) -> ParityReport:
    output = OutputParity(
        component="decoder_model_merged",
        output="logits (prefill)",
        calls=3,
        max_abs_diff=2e-5 if passed else 0.5,
        max_abs_reference=12.0,
        atol=1e-4,
        rtol=1e-4,
        passed=passed,
        reason="" if passed else "0.5 is more than 0.0013",
    )
    return ParityReport(
        bundle="somewhere",
        candidate="ONNX Runtime (CPU)",
        reference="PyTorch (CPU)",
        outputs=(output,),
        num_questions=3,
        equal_tokens=3 if passed else 2,
        equal_boxes=3,
        ties=0,
        differing=()
        if passed
        else ({"expression": "the dog", "reference": "a", "candidate": "b", "margin": 0.5},),
    )


def test_an_honest_bundle_passes(run_cli, tiny_bundle, tiny_checkpoint):
    outcome = run_cli("check", tiny_bundle, "--samples", "2", "--json")
    assert outcome.code == 0
    assert outcome.plain["passed"] is True
    assert outcome.plain["num_questions"] == 2

    outcome = run_cli("check", tiny_bundle, "--checkpoint", tiny_checkpoint, "--samples", "1")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == "passed"
    assert "same tokens: 1 of 1" in outcome.out


def test_engines_that_are_not_there_are_refused_before_the_work(run_cli, tiny_bundle):
    outcome = run_cli("check", tiny_bundle, "--backend", "trt", "-q")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the bundle holds no engines" in outcome.err


def test_a_part_of_another_role_is_refused(run_cli, tiny_bundle, tmp_path):
    outcome = run_cli("check", tiny_bundle, "--checkpoint", f"base={tmp_path}")
    assert outcome.code == 2
    assert "the bundle's checkpoint has no such part: base; allowed: main" in outcome.err


@pytest.fixture
def asked(monkeypatch):
    """Questions of the checks asked for."""
    seen = []

    def record(bundle, *, recipe, checkpoint, questions, backend, engines, progress):
        assert (backend, engines) == ("onnxruntime", None)
        seen.extend(questions)
        return report(passed=True)

    monkeypatch.setattr(parity_check, "check_bundle", record)
    return seen


def test_pictures_of_the_user_are_asked_about_as_well(run_cli, tiny_bundle, asked, tmp_path):
    mine = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    for path in mine:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    flags = [part for path in mine for part in ("--image", path)]
    assert run_cli("check", tiny_bundle, "--samples", "2", "--seed", "5", *flags).code == 0
    assert [q.image for q in asked[2:]] == mine
    assert [q.expression for q in asked[2:]] == [asked[n].expression for n in (0, 1, 0)]


def test_the_seed_decides_the_questions(run_cli, tiny_bundle, asked):
    for seed in (1, 1, 2):
        run_cli("check", tiny_bundle, "--samples", "1", "--seed", seed)
    first, again, other = asked
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_a_difference_exits_3_after_the_report(run_cli, tiny_bundle, monkeypatch):
    monkeypatch.setattr(parity_check, "check_bundle", lambda *a, **k: report(passed=False))
    outcome = run_cli("check", tiny_bundle, "--samples", "1")
    assert outcome.code == 3
    assert "FAILED: 0.5 is more than 0.0013" in outcome.out
    assert '"the dog": a -> b' in outcome.out
    assert "decoder_model_merged logits (prefill), 1 answers with other tokens" in outcome.err

    outcome = run_cli("check", tiny_bundle, "--samples", "1", "--json")
    assert (outcome.code, outcome.plain["passed"]) == (3, False)
