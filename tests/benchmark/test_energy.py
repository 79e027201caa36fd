"""Meters that are made of files and of modules of ours."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from gap_export.benchmark import energy


@pytest.fixture
def powercap(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    (zone / "intel-rapl:0:0").mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("900000\n")
    (zone / "max_energy_range_uj").write_text("1000000\n")
    return tmp_path


@pytest.fixture(autouse=True)
def no_board(monkeypatch):
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_rapl_counts_on_where_its_counter_begins_again(powercap):
    meter, name = energy.find_meter(powercap)
    assert name == "RAPL (package-0)"
    before = meter.joules()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("100000")
    assert meter.joules() - before == pytest.approx(0.2)


def test_without_meters_the_reasons_are_said(tmp_path):
    meter, why = energy.find_meter(tmp_path)
    assert meter is None
    assert why.startswith("not measured: nvidia-ml-py (extra bench) is not installed; no RAPL")


def test_counters_that_cannot_be_read_are_said(powercap):
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    meter, why = energy.find_meter(powercap)
    assert meter is None
    assert "energy_uj cannot be read: try as root" in why


def test_a_gpu_counts_millijoules(monkeypatch):
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: 1500 + gpu,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter, name = energy.find_meter()
    assert (meter.joules(), name) == (3.001, "NVML (2 GPUs)")
    meter.close()


def test_a_gpu_that_counts_no_energy_is_said(monkeypatch, tmp_path):
    def refuse():
        raise RuntimeError("Not Supported")

    nvml = SimpleNamespace(NVMLError=RuntimeError, nvmlInit=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert "no GPU that counts energy (Not Supported)" in energy.find_meter(tmp_path)[1]


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        # The board's own rail, of which the others are parts.
        ("RAM 1/2MB VDD_IN 5000mW/4900mW VDD_CPU_GPU_CV 900mW/800mW VDD_SOC 1mW/1mW", 5.0),
        ("VDD_GPU_SOC 4940mW/4940mW VDD_CPU_CV 987mW/987mW cpu@40C", 5.927),
        ("RAM 1/2MB", 0.0),
    ],
)
def test_power_of_a_jetson_is_the_boards_or_the_sum_of_its_rails(line, watts):
    assert energy.board_watts(line) == pytest.approx(watts)
