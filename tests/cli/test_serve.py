"""``gap-export serve``: from a command line to a graceful stop."""

from __future__ import annotations

import signal
import socket
import sys

import httpx

from tests.programs import start_program

WORDS = "the red circle"


def test_it_says_where_it_serves_and_stops_in_order(tiny_bundle):
    command = [sys.executable, "-m", "gap_export", "serve", tiny_bundle, "--port", "0"]
    with start_program(command) as process:
        lines = iter(process.stderr.readline, "")
        said = next(line for line in lines if line.startswith("serving "))
        url = said.split()[-1]
        assert said.startswith(f"serving {tiny_bundle.name} at http://127.0.0.1:")
        pixels = {"image": bytes(48), "expressions": (None, WORDS), "shape": (None, "4,4,3")}
        while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
            pass
        answer = httpx.post(f"{url}/v1/ground", files=pixels, timeout=60)
        assert answer.json()["groundings"][0]["image_size"] == [4, 4]
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert '"route": "/v1/ground", "status": 200' in rest
    assert "stopped; all that was let in was answered" in rest


def test_an_address_that_is_taken_is_refused_before_anything_is_opened(run_cli, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = run_cli("serve", tmp_path / "none", "--port", taken.getsockname()[1])
    assert outcome.code == 2 and "cannot listen there" in outcome.err


def test_other_machines_need_a_key(run_cli, tiny_bundle):
    outcome = run_cli("serve", tiny_bundle, "--host", "0.0.0.0", "--port", "0")
    assert outcome.code == 2 and "--api-keys" in outcome.err


def test_a_folder_that_is_no_bundle_is_refused(run_cli, tmp_path):
    outcome = run_cli("serve", tmp_path, "--port", "0")
    assert outcome.code == 2 and "gap.json is missing" in outcome.err
    outcome = run_cli("serve", tmp_path, tmp_path, "--port", "0")
    assert outcome.code == 2 and "name of its own" in outcome.err
