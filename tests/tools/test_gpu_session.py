"""``tools/gpu_session.py`` works, though no GPU is here: every step of it is really taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gap_export
from gap_export.errors import EngineError, MissingDependencyError
from gap_export.runtime.backends.quiet_onnxruntime import ort
from gap_export.spec.manifest import EngineLimits
from tests.benchmark.made_up import report_of
from tests.programs import run_program
from tests.runtime.backends.fake_tensorrt import copy_bundle, use_fakes, write_engines

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
TOOL = TOOLS / "gpu_session.py"
LIMITS = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=4, max_images=1)


@pytest.fixture
def tool(monkeypatch):
    """The tool's modules, which import each other as its process has them."""
    monkeypatch.syspath_prepend(str(TOOLS))
    before = {*sys.modules}
    import gpu_session
    from gpu_steps import asking, page, place, record, steps, watch

    modules = (asking, page, place, record, steps, watch)
    yield SimpleNamespace(main=gpu_session, **{m.__name__.rpartition(".")[2]: m for m in modules})
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(f"{TOOLS}/"):
            del sys.modules[name]


@pytest.fixture
def take(tool, tmp_path):
    """Takes all steps in this process; the page's source, without a file of figures."""

    def steps(place):
        results = {"gap_export": "1", "gpu": "a GPU", "rehearsal": False, "steps": {}}
        for name, step in tool.steps.STEPS.items():
            file = tmp_path / f"{name}.json"
            step.work(place, tool.record.StepRecord(file))
            results["steps"][name] = {
                "seconds": 1.0,
                "items": json.loads(file.read_text()),
                "gpu": {"not_measured": "nobody looked"},
            }
        return results

    return steps


@pytest.fixture
def stand_ins(monkeypatch, tiny_bundle):
    """Exports are copies of a tiny bundle, engines are fakes, and a benchmark is made up."""
    use_fakes(monkeypatch)
    asked = []

    def export(model, pruning, *, out, engines=None, **options):
        asked.append((out.name, model, pruning.keep_ratio, options.get("weights")))
        bundle = copy_bundle(tiny_bundle, out)
        if engines is not None:
            write_engines(bundle, LIMITS)

    def bench(bundles, *, unpruned, backends, **options):
        (backend,) = backends
        name = {"ort": "CPUExecutionProvider", "trt": "TensorRT"}[backend]
        rows = [
            SimpleNamespace(**{**row.__dict__, "runs": name, "bundle": str(path)})
            for row, path in zip(report_of().rows, [unpruned, *bundles], strict=False)
        ]
        plain = report_of().to_plain()
        for given, row in zip(plain["rows"], rows, strict=True):
            given.update(runs=row.runs, bundle=row.bundle)
        return SimpleNamespace(to_plain=lambda: plain)

    monkeypatch.setattr(gap_export, "export", export, raising=False)
    monkeypatch.setattr(gap_export, "bench", bench, raising=False)
    return asked


def test_every_step_does_its_work_with_stand_ins(tool, take, stand_ins, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="the extra trt-rtx is not installed")
    # What differs between two keep ratios or dtypes is seen with two.
    monkeypatch.setattr(tool.steps, "KEEPS", (1.0, 0.3))
    monkeypatch.setattr(tool.steps, "DTYPES", ("int4",))
    place = tool.place.Place(
        folder=tmp_path,
        gpu=tool.place.rehearsal(tmp_path).gpu,
        provider="CPUExecutionProvider",
        torch_device="cpu",
        samples=1,
        rounds=1,
        shape=lambda folder: (folder.mkdir(exist_ok=True), (folder / "weights").write_bytes(b"1")),
    )
    results = take(place)
    items = [
        (name, item["name"], item["outcome"], item["reason"])
        for name, step in results["steps"].items()
        for item in step["items"]
    ]
    # The engines have a cache that grows, of which no CUDA graph can be recorded.
    missing = [item for item in items if item[2] != "ran"]
    assert [name for _, name, _, _ in missing] == [
        f"demo-{keep}-trt: run, CUDA graphs" for keep in ("1", "0.3")
    ], missing
    assert len(items) > 30
    asked = {name: (model, keep) for name, model, keep, _ in stand_ins}
    assert asked["demo-0.3-trt"] == ("refshapes-llava", 0.3)
    assert asked["shape-1"] == (str(tmp_path / "shape"), 1.0)
    page = tool.page.page_of(results)
    assert "failed" not in page.replace("0 failed", "")
    assert "1 of 1 | 1.00 |" in page and "positions passed" in page
    assert page.count("\n### ") == len(tool.steps.STEPS)


def test_without_a_gpu_nothing_is_claimed(tool, take, stand_ins, tmp_path):
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    results = take(tool.place.Place(folder=tmp_path, gpu=None, samples=1, rounds=1))
    for name, step in results["steps"].items():
        found = {item["outcome"] for item in step["items"]}
        assert found <= ({"ran", "not run"} if name in ("environment", "bundles") else {"not run"})
        assert all(item["reason"] for item in step["items"] if item["outcome"] != "ran")
    page = tool.page.page_of(results)
    assert "onnxruntime-gpu has it" in page and "libcuda.so.1" in page
    # One reason for many items is told once.
    assert page.count("libcuda.so.1") <= 4


def test_what_ran_stays_and_what_did_not_is_tried_again(tool, tmp_path):
    calls = []

    def fail(error):
        calls.append("fail")
        raise error

    file = tmp_path / "step.json"
    first = tool.record.StepRecord(file)
    assert first.do("a", lambda: {"x": 1}) == {"x": 1}
    assert first.do("b", lambda: fail(EngineError("no kernel"))) is None
    assert first.do("c", lambda: fail(MissingDependencyError("no package"))) is None
    assert [item.outcome for item in tool.record.read_items(file)] == ["ran", "failed", "not run"]
    again = tool.record.StepRecord(file)
    assert again.do("a", lambda: fail(ValueError("done twice"))) == {"x": 1}
    assert again.do("b", lambda: {"x": 2}) == {"x": 2}
    assert calls == ["fail", "fail"]


def test_a_step_that_crashes_or_hangs_costs_itself_alone(tool):
    watch = tool.watch.GpuWatch(FakeNvml())

    def ends(code, limit_s=20.0):
        return tool.main._watched([sys.executable, "-S", "-c", code], limit_s, watch)

    assert ends("pass") == ""
    assert ends("import os; os.abort()") == "ended with signal SIGABRT: it said nothing"
    assert ends("print(1); raise SystemExit('out of memory')").endswith(
        "exit code 1: out of memory"
    )
    assert ends("import time; time.sleep(60)", 0.3).startswith("stopped after 0 s")


class FakeNvml:
    """As much of pynvml as is used; ``lacks`` is a call that a board does not have."""

    NVMLError = ValueError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, lacks=""):
        self.joules, self.lacks = 0.0, lacks

    def nvmlInit(self):  # noqa: N802 - its name
        self._has("nvmlInit")

    nvmlShutdown = nvmlInit  # noqa: N815

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, gpu):  # noqa: N802
        return SimpleNamespace(used=1_000_000_000 * (gpu + 1))

    def nvmlDeviceGetPowerUsage(self, gpu):  # noqa: N802
        self._has("power")
        return 100_000

    def nvmlDeviceGetTemperature(self, gpu, sensor):  # noqa: N802
        return 50 + gpu

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):  # noqa: N802
        self.joules += 5.0
        return 1e3 * self.joules

    def _has(self, call):
        if call == self.lacks:
            raise ValueError(f"{call} is not supported")


def test_gpus_are_watched_together_and_what_a_board_does_not_tell_is_none(tool):
    watch = tool.watch.GpuWatch(FakeNvml())
    watch.sample()
    assert watch.figures() == {
        "gpus": 2,
        "samples": 1,
        "memory_at_first_bytes": 3_000_000_000,
        "memory_peak_bytes": 3_000_000_000,
        "power_mean_w": 200.0,
        "power_max_w": 200.0,
        "temperature_max_c": 51,
        # 5 + 10 J at first, 15 + 20 J now.
        "energy_j": 20.0,
    }
    silent = tool.watch.GpuWatch(FakeNvml("power"))
    silent.sample()
    assert silent.figures()["power_mean_w"] is None
    assert "W on average: not told" in tool.page._gpu(silent.figures())
    assert "is not supported" in tool.watch.GpuWatch(FakeNvml("nvmlInit")).figures()["not_measured"]


def test_a_folder_holds_one_session(tool, tmp_path, monkeypatch):
    results = tool.main.begin(tmp_path, rehearse=True)
    tool.record.write_json(tmp_path / "results.json", results)
    assert tool.main.begin(tmp_path, rehearse=True) == results
    with pytest.raises(SystemExit, match=r"holds another session.*rehearsal: True, here False"):
        tool.main.begin(tmp_path, rehearse=False)
    with pytest.raises(SystemExit, match="no figures to publish"):
        tool.main.report(tmp_path, write=True)


def test_the_page_is_made_of_the_published_figures(tool):
    file = tool.main.PUBLISHED
    found = json.loads(file.read_text()) if file.is_file() else None
    page = (ROOT / "docs" / "results" / "gpu.md").read_text()
    assert f"<!-- figures:gpu -->\n{tool.page.page_of(found)}\n<!-- /figures:gpu -->" in page


def test_a_step_without_time_is_not_begun(tool, tmp_path):
    found = tool.main.run_step(
        tool.steps.STEPS["environment"], tmp_path, limit_s=1.0, rehearse=True
    )
    (item,) = found["items"]
    assert item["outcome"] == "not run" and "1 s are left" in item["reason"]


@pytest.mark.full
def test_a_rehearsal_takes_all_steps_as_the_command_does(tmp_path):
    out = tmp_path / "session"
    command = [sys.executable, TOOL, "run", "--rehearse", "--out", out, "--limit", "3000"]
    done = run_program(command, seconds=3300)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    failed = [
        (name, item["name"], item["reason"])
        for name, step in results["steps"].items()
        for item in step["items"]
        if item["outcome"] == "failed"
    ]
    assert failed == []
    ran = {name: [i["outcome"] for i in s["items"]] for name, s in results["steps"].items()}
    # TensorRT for RTX builds without a GPU, and runs nothing.
    for name in ("environment", "bundles", "cuda", "torch"):
        assert set(ran[name]) == {"ran"}, name
    assert "A rehearsal" in (out / "gpu.md").read_text()
