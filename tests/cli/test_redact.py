"""A report that is sent to others tells of the machine, and not of whose it is."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import pytest

from gap_export.cli._redact import redact

SECRET = {
    "executable": "/home/annabel/.venv/bin/python",
    "problems": [
        "pip install '/home/annabel/my secret.whl[gpu]' on rover-7.lab",
        "libcudnn.so.9 not found in /opt/annabel/cuda:/usr/lib",
        "C:\\Users\\annabel\\gap is missing",
        "pip install 'gap-export @ git+https://annabel:hunter2@git.example/x@abc'",
    ],
    "gpus": [{"name": "NVIDIA RTX 4090, GPU-8f5c1a2e-0b1c-4d5e-9f00-aabbccddeeff"}],
    "net": ("48:b0:2d:11:22:33", "192.168.55.1", "Serial Number: 1421321043", "rover-7 of annabel"),
    "memory": 7,
}
WORDS = (
    "annabel",
    "rover",
    "hunter2",
    "8f5c1a2e",
    "48:b0",
    "192.168",
    "1421321043",
    "cuda:",
    "lib'",
    "secret",
)
KEPT = {
    "versions": ["10.16.2.3", "1.7.1.116", "R36.4.3", "onnxruntime-gpu", "11.4 or 12.x/13"],
    "system": "Linux-5.15.148-tegra-aarch64-with-glibc2.35",
    "board": "NVIDIA Jetson Orin Nano Developer Kit",
    "needs": "tensorrt: 10.3 (JetPack 6.2), 10.16 to 11.4 (JetPack 7.2), on the GPU",
    "numbers": [1, 2.5, None, True],
}


@pytest.fixture(autouse=True)
def _somebody(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "annabel")
    monkeypatch.setattr(socket, "gethostname", lambda: "rover-7.lab")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/annabel"))


def test_names_paths_addresses_and_serial_numbers_are_left_out():
    told = json.dumps(redact(SECRET))
    assert [word for word in WORDS if word.lower() in told.lower()] == []
    assert "NVIDIA RTX 4090" in told and "libcudnn.so.9 not found in <path>" in told


def test_what_a_machine_is_stays():
    assert redact(KEPT) == KEPT


def test_a_user_called_as_the_maker_hides_no_board(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "nvidia")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/nvidia"))
    assert redact(KEPT) == KEPT
    assert redact("by nvidia") == "by <name>"


def test_doctor_reports_without_paths(run_cli, monkeypatch):
    told = run_cli("doctor", "--report")
    assert told.code == 0 and told.plain["python"]["executable"] == "<path>"
    assert "/" not in told.out.replace("n/a", "")
    assert told.plain["packages"]["base"]["numpy"]
