"""Which export a plan chooses, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gap_export
from gap_export.cli._main import main
from gap_export.errors import ExitCode, UsageError
from gap_export.planning.calibrate import Point, calibrated, fit_points, read_benchmark
from gap_export.planning.devices import cpu_of, find_device, list_devices
from gap_export.planning.results import PlanReport

ORIN = "orin-nano-8gb"


def plan(**given: object) -> PlanReport:
    asked = {"device": ORIN, "keep": [1.0, 0.3], "dtypes": ["float16"], **given}
    return gap_export.plan("refshapes-llava", **asked)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report() -> PlanReport:
    return plan()


def test_without_a_latency_budget_all_tokens_are_kept(report: PlanReport) -> None:
    assert report.best is not None
    assert report.best.keep_ratio == 1
    assert report.best.command.startswith("gap-export refshapes-llava --keep 1 --pruner")
    assert report.best.command.endswith("--dtype float16 --trt orin")


def test_a_latency_budget_prunes(report: PlanReport) -> None:
    slow, fast = (one.latency_ms.likely for one in report.configurations)
    chosen = plan(latency_ms=(slow + fast) / 2).best
    assert chosen is not None
    assert chosen.keep_ratio == 0.3
    assert [one.meets for one in plan(latency_ms=(slow + fast) / 2).configurations] == [False, True]


@pytest.mark.full
def test_a_smaller_budget_never_chooses_more_tokens(report: PlanReport) -> None:
    for factor in (2.0, 1.0, 0.99, 0.5):
        found = plan(latency_ms=factor * report.configurations[0].latency_ms.likely)
        kept = 0 if found.best is None else found.best.visual_tokens
        assert kept <= 144


def test_accuracy_is_what_was_measured(report: PlanReport) -> None:
    whole = report.configurations[0].accuracy
    assert whole is not None
    assert whole.interval[0] <= whole.acc_at_50 <= whole.interval[1]
    assert whole.n >= 500


def test_memory_parts_add_up_and_weights_are_exact(report: PlanReport) -> None:
    for one in report.configurations:
        parts = [part.high for name, part in one.memory.items() if name != "total"]
        assert one.memory_bytes.high == pytest.approx(sum(parts))
    stored = (Path(__file__).parents[2] / "models/refshapes-llava/model.safetensors").stat().st_size
    # float16 of float32; the tower's last layer is in the file and in no graph.
    assert 0.8 * stored / 2 < report.configurations[0].memory["weights"].likely < stored / 2


def test_the_plain_form_is_json(report: PlanReport) -> None:
    plain = json.loads(json.dumps(report.to_plain(), allow_nan=False))
    assert plain["schema"] == "gap-export-plan"
    assert plain["configurations"][0]["memory"]["weights"]["basis"]


def test_nothing_meets_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "refshapes-llava", "--device", ORIN, "--keep", "0.3", "--latency", "0.001ms"]
    assert main(line) == ExitCode.BELOW_BAR
    told = capsys.readouterr()
    assert "nothing of refshapes-llava meets the budget" in told.err
    assert "the quickest that fits is keep 0.3" in told.err
    assert "late" in told.out


def test_the_smallest_is_named_where_nothing_fits() -> None:
    found = plan(memory_gb=0.1)
    assert found.best is None
    assert found.nearest is not None
    assert not found.nearest.fits


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device": "orin-nano-8g"}, "did you mean orin-nano-8gb"),
        ({"device": "abacus"}, "--device-file"),
        ({"memory_gb": 16.0}, "contradict each other"),
        ({"latency_ms": 0.0}, "above 0"),
        ({"memory_gb": float("nan")}, "above 0"),
        ({"dtypes": ["float64"]}, "float32, float16, bfloat16, int4"),
        ({"keep": [0.0]}, "keep"),
        ({"pruners": ["no-such"]}, "no-such"),
        ({"canvases": ["100x100"]}, "one size"),
    ],
)
def test_what_is_no_choice_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(**given)


def test_sizes_that_are_in_a_checkpoint_alone(tmp_path: Path) -> None:
    recipe = (Path(__file__).parents[2] / "models/refshapes-llava/recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(UsageError):
        gap_export.plan(str(tmp_path), device=ORIN)


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"schema": "gap-export-bench"}'])
def test_what_is_no_benchmark_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(UsageError, match="gap-export bench"):
        read_benchmark(file)


@pytest.mark.parametrize("amount", ["250", "ms", "-1ms", "0s", "1e9ms", "6GB"])
def test_an_amount_without_its_unit_is_refused(
    amount: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "refshapes-llava", f"--latency={amount}"]) == ExitCode.USAGE
    assert "--latency 250ms" in capsys.readouterr().err


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "devices:\n  board:\n    title: Mine\n    groups: [gpu, jetson]\n    memory_gb: 4\n"
        "    bandwidth_gb_s: 10\n    tera_operations: {float16: 1}\n    software: none\n"
        "    target: orin\n    source: me\n"
    )
    assert find_device("board", file).memory_gb == 4
    file.write_text(file.read_text().replace("memory_gb: 4", "memory_gb: -4"))
    with pytest.raises(UsageError, match="device board"):
        find_device("board", file)


def test_every_device_names_its_source_and_ascends() -> None:
    for device in list_devices().values():
        assert len(device.source) > 10
        assert device.dtypes == ("float16", "int4")
        assert device.rate("float16") <= device.rate("int8")


def test_a_fit_finds_the_share_and_the_step_that_made_the_points() -> None:
    points = [
        Point(stage="prefill", dtype="float32", row="", ideal_ms=x, measured_ms=x / 0.8 + 0.5)
        for x in (1.0, 5.0, 100.0)
    ]
    (fit,) = fit_points(points).values()
    assert (fit.share, fit.step_us) == (pytest.approx(0.8), pytest.approx(500))


def test_a_benchmark_moves_a_plan_to_what_it_measured() -> None:
    stages = {name: {"median": 7.0} for name in ("vision_encoder", "prefill", "decode_token")}
    row = {"name": "demo", "dtype": "float32", "keep_ratio": 1.0, "prompt_tokens": 170}
    measured = {
        "model": "refshapes-llava",
        "rows": [{**row, "answer_tokens": 32, "stages": stages}],
    }
    fits = calibrated(cpu_of(100.0, 10.0, 1), [measured]).fits
    assert set(fits) == {"tower float32", "prefill float32", "decode float32"}
    assert all(fit.num_rows == 1 for fit in fits.values())
