"""``gap-export check``: what is printed, what is written, and the exit codes."""

from __future__ import annotations

import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from gap_export.parity import check as parity_check
from gap_export.parity.results import LEVELS, BackendResult, CheckReport, LevelResult
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from tests.engines.conftest import *  # noqa: F403 - its fixtures
from tests.patching.conftest import *  # noqa: F403 - its fixtures


@pytest.fixture
def asked(monkeypatch):
    """What checks were asked for; nothing is run."""
    seen = []
    level = LevelResult(level="token", status="passed")
    verdict = CheckReport(
        bundle="somewhere",
        model="tiny",
        pruner="spatial",
        keep_ratio=0.3,
        reference="PyTorch",
        questions=3,
        seed=0,
        backends=(BackendResult(backend="ort", name="X", seconds=1.0, levels=(level,)),),
    )

    def record(bundle, *, reference, progress, **options):
        seen.append({"reference": reference, **options})
        return verdict

    monkeypatch.setattr(parity_check, "check_bundle", record)
    return seen


def test_an_honest_bundle_passes(run_cli, tiny_bundle, tiny_checkpoint, tmp_path):
    files = {
        "--report-json": "report.json", "--junit": "junit.xml", "--markdown": "summary.md",
    }  # fmt: skip
    flags = [part for flag, name in files.items() for part in (flag, tmp_path / name)]
    outcome = run_cli("check", tiny_bundle, "--against", tiny_checkpoint, "--samples", "1", *flags)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[-1] == "passed"
    words = [line.split()[:2] for line in lines if line]
    assert all([level, "passed"] in words for level in LEVELS)
    assert {path.name for path in tmp_path.iterdir()} == set(files.values())
    plain = json.loads((tmp_path / "report.json").read_text())
    assert plain["passed"] is True and plain["questions"] == 1
    cases = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase")
    # Of either form of the graphs.
    assert len(list(cases)) == 2 * len(LEVELS)
    assert "passed" in (tmp_path / "summary.md").read_text()


def test_a_difference_exits_3_after_the_report(run_cli, tiny_bundle, tmp_path, monkeypatch):
    honest = OnnxRuntimeBackend.run

    def run(self, component, feed):
        outputs = honest(self, component, feed)
        if component == "embed_tokens":
            outputs["inputs_embeds"] += np.float32(1e-3)
        return outputs

    monkeypatch.setattr(OnnxRuntimeBackend, "run", run)
    written = tmp_path / "report.json"
    flags = [
        "--level",
        "tensor",
        "--samples",
        "1",
        "--form",
        "base",
        "--json",
        "--report-json",
        written,
    ]
    outcome = run_cli("check", tiny_bundle, *flags)
    assert (outcome.code, outcome.plain["passed"]) == (3, False)
    assert json.loads(written.read_text()) == outcome.plain
    assert "CPUExecutionProvider): tensor; see the report" in outcome.err
    assert [level["level"] for level in outcome.plain["backends"][0]["levels"]] == ["tensor"]


def test_the_checkpoint_has_two_names_and_one_is_enough(
    run_cli, tiny_bundle, tiny_checkpoint, asked
):
    for flag in ("--against", "--checkpoint"):
        assert run_cli("check", tiny_bundle, flag, f"main={tiny_checkpoint}").code == 0
    assert len(asked) == 2


def test_images_of_the_user_are_asked_about_as_well(run_cli, tiny_bundle, asked, tmp_path):
    mine = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    for path in mine:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    flags = [part for path in mine for part in ("--image", path)]
    assert run_cli("check", tiny_bundle, "--samples", "2", "--seed", "5", *flags).code == 0
    questions = asked[0]["reference"].questions
    assert asked[0]["reference"].seed == 5
    assert [q.image for q in questions[2:]] == mine
    assert [q.expression for q in questions[2:]] == [questions[n].expression for n in (0, 1, 0)]
    assert [q.box is None for q in questions] == [False, False, True, True, True]


def test_the_seed_decides_the_questions(run_cli, tiny_bundle, asked):
    for seed in (1, 1, 2):
        run_cli("check", tiny_bundle, "--samples", "1", "--seed", seed)
    first, again, other = (one["reference"].questions[0] for one in asked)
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_repeated_options_are_handed_on(run_cli, tiny_bundle, asked):
    flags = ["--backend", "trt", "--backend", "ort", "--level", "box", "--level", "token"]
    bars = ["--fail-under", "token=0.98", "--fail-under", "box=.9"]
    assert run_cli("check", tiny_bundle, *flags, *bars, "--require", "trt").code == 0
    (options,) = asked
    assert options["backends"] == ["trt", "ort"] and options["required"] == ["trt"]
    assert options["levels"] == ["box", "token"]
    assert options["fail_under"] == {"token": 0.98, "box": 0.9}
    assert len(options["reference"].questions) == 50

    run_cli("check", tiny_bundle, "--level", "positions")
    assert asked[1]["backends"] == ["ort"]
    # No checkpoint is looked for where none is needed.
    assert asked[1]["reference"] is None


def test_what_cannot_run_is_reported_and_is_a_failure_only_where_required(run_cli, tiny_bundle):
    flags = ["--samples", "1", "--level", "token", "-q"]
    outcome = run_cli("check", tiny_bundle, "--backend", "ort", "--backend", "trt", *flags)
    assert outcome.code == 0
    assert "TensorRT: not run: " in outcome.out
    assert "the bundle holds no engines" in outcome.out

    outcome = run_cli("check", tiny_bundle, "--require", "trt", *flags)
    assert outcome.code == 3
    assert "TensorRT: not run: " in outcome.err and "or leave out --require" in outcome.err

    outcome = run_cli("check", tiny_bundle, "--backend", "trt", *flags)
    assert outcome.code == 2
    assert "nothing could be checked" in outcome.err and "holds no engines" in outcome.err

    outcome = run_cli("check", tiny_bundle, "--backend", "trt", "--require", "trt", *flags)
    assert outcome.code == 3


def test_a_damaged_bundle_is_refused_before_anything_runs(run_cli, tiny_bundle, asked, tmp_path):
    damaged = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, damaged)
    weights = next(damaged.glob("*.safetensors"))
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    outcome = run_cli("check", damaged, "--level", "positions")
    assert outcome.code == 2 and weights.name in outcome.err
    assert asked == []


def test_a_golden_is_recorded_and_checked_against(run_cli, tiny_bundle, tmp_path):
    golden = tmp_path / "golden"
    outcome = run_cli("check", tiny_bundle, "--record", golden, "--samples", "2", "-q")
    assert outcome.code == 0 and outcome.out.strip() == str(golden)
    outcome = run_cli("check", tiny_bundle, "--against", golden, "--json", "-q")
    assert outcome.code == 0, outcome.err
    assert outcome.plain["questions"] == 2
    assert outcome.plain["reference"].startswith("golden of PyTorch")

    again = run_cli("check", tiny_bundle, "--record", golden, "--samples", "1", "-q")
    assert again.code == 2
    assert run_cli("check", tiny_bundle, "--record", golden, "--samples", "1", "--force").code == 0

    for flags, words in [
        (["--samples", "3"], "--samples cannot be used here: a golden says what was asked"),
        (["--seed", "0"], "--seed cannot be used here"),
        (["--per-layer"], "layers can be compared with PyTorch alone"),
        (["--record", tmp_path / "other"], "not from another golden"),
        (["--against", golden], "the only one to compare with"),
    ]:
        outcome = run_cli("check", tiny_bundle, "--against", golden, *flags, "-q")
        assert outcome.code == 2 and words in outcome.err, outcome.err


def test_a_patched_bundle_is_compared_with_its_export(run_cli, tiny_export, patch, tmp_path):
    bundle = patch(tiny_export).bundle
    outcome = run_cli("check", bundle, "--samples", "1")
    assert outcome.code == 2 and "--against DIR" in outcome.err

    flags = ["--against", tiny_export, "--samples", "2", "-q"]
    outcome = run_cli("check", bundle, *flags, "--json", "--backend", "ort", "--backend", "trt")
    assert outcome.code == 0, outcome.err
    ort, trt = outcome.plain["backends"]
    by_level = {level["level"]: level for level in ort["levels"]}
    assert by_level["tensor"]["status"] == "passed"
    assert {row["tensor"] for row in by_level["tensor"]["rows"]} == {
        "image_features", "logits (prefill)", "logits (decode)", "logits (cached)",
    }  # fmt: skip
    others = [level for name, level in by_level.items() if name != "tensor"]
    assert all(level["status"] == "not_run" and level["reason"] for level in others)
    assert {level["status"] for level in trt["levels"]} == {"not_run"}
    assert outcome.plain["reference"].startswith("the unpatched graphs of")

    assert run_cli("check", bundle, *flags, "--require", "trt").code == 3
    assert run_cli("check", bundle, *flags, "--level", "token").code == 2
    outcome = run_cli("check", bundle, *flags, "--fail-under", "token=1")
    assert outcome.code == 2 and "--fail-under cannot be used here" in outcome.err
    outcome = run_cli("check", bundle, "--record", tmp_path / "golden")
    assert outcome.code == 2 and "PyTorch does not know" in outcome.err
    assert run_cli("check", bundle, "--level", "positions").code == 0


def test_nothing_is_written_into_a_bundle_or_a_golden(run_cli, tiny_bundle, tmp_path):
    bundle, golden = tmp_path / "bundle", tmp_path / "golden"
    shutil.copytree(tiny_bundle, bundle)
    assert run_cli("check", bundle, "--record", golden, "--samples", "1", "-q").code == 0
    (tmp_path / "link").symlink_to(bundle)
    for flags, words in [
        (["--report-json", bundle / "gap.json"], "the JSON report would be inside the bundle"),
        (["--junit", tmp_path / "link" / "junit.xml"], "the JUnit report would be inside the"),
        (["--against", golden, "--markdown", golden / "golden.json"], "inside the golden"),
        (["--record", tmp_path / "link" / "golden"], "the golden would be inside a bundle"),
    ]:
        outcome = run_cli("check", bundle, *flags, "-q")
        assert outcome.code == 2 and words in outcome.err, outcome.err
    assert run_cli("check", bundle, "--against", golden, "-q").code == 0


def test_a_file_of_a_golden_stands_for_its_folder(run_cli, tiny_bundle, tmp_path):
    golden = tmp_path / "golden"
    assert run_cli("check", tiny_bundle, "--record", golden, "--samples", "1", "-q").code == 0
    flags = ["--level", "tensor", "-q", "--json"]
    outcome = run_cli("check", tiny_bundle, "--against", golden / "golden.json", *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.plain["reference"].startswith("golden of PyTorch")
    inside = ["--against", golden / "golden.json", "--markdown", golden / "summary.md"]
    assert "inside the golden" in run_cli("check", tiny_bundle, *inside).err


def test_accuracy_below_the_bar_is_no_reason_to_export_again(run_cli, tiny_bundle):
    flags = ["--level", "task", "--fail-under", "task=1", "--samples", "2", "-q"]
    outcome = run_cli("check", tiny_bundle, *flags)
    assert outcome.code == 3
    assert "export the bundle again" not in outcome.err
    assert "keep more tokens, take another pruner, or ask less" in outcome.err


def test_checks_of_one_github_step_share_its_summary(run_cli, tiny_bundle, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    check = ["check", tiny_bundle, "--level", "positions", "-q", "--markdown", summary]

    def checked_once_more() -> str:
        assert run_cli(*check).code == 0
        # How long it took is in it.
        return re.sub(r"\(\d+\.\d s\)", "(seconds)", summary.read_text())

    one = checked_once_more()
    assert "(seconds)" in one and checked_once_more() == one
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert checked_once_more() == f"{one}\n{one}"


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _edit_plan(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


_ENGINE, _PLAN = "embed_tokens.engine", "engine.json"
# What else is refused of a folder of engines is tested where that is read.
DAMAGE = {
    "a bit": (lambda f: _flip(f / _ENGINE), "engine embed_tokens.engine is not what was built"),
    "no JSON": (lambda f: (f / _PLAN).write_text("{"), "engine.json"),
    "other form": (
        lambda f: _edit_plan(f / _PLAN, '"lowering": "', '"lowering": "un'),
        "engine.json",
    ),
    "other number": (
        lambda f: _edit_plan(f / _PLAN, '"peak_memory_bytes": ', '"peak_memory_bytes": 1'),
        "engine.json is not what was written when the engines were built",
    ),
    "a file of no build": (lambda f: (f.parent / "notes").touch(), "no folder of engines: notes"),
    "another target": (lambda f: (f.parent / "orin").mkdir(), "engine.json is missing"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_engines_are_refused_whatever_can_run(
    run_cli, built_bundle, asked, tmp_path, damage, words
):
    bundle = tmp_path / "bundle"
    shutil.copytree(built_bundle.path, bundle)
    (folder,) = (bundle / "engines").iterdir()
    damage(folder)
    for flags in (["--level", "positions"], ["--record", tmp_path / "golden"]):
        outcome = run_cli("check", bundle, *flags)
        assert (outcome.code, asked) == (2, []) and words in outcome.err
    assert not (tmp_path / "golden").exists()


def test_whole_engines_do_not_keep_a_bundle_from_its_check(run_cli, built_bundle):
    outcome = run_cli("check", built_bundle.path, "--level", "positions")
    assert outcome.code == 0, outcome.err
