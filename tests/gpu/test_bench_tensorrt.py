"""``tools/bench_tensorrt.py`` writes down what happened, on a machine without a GPU as well."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.programs import run_program

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "bench_tensorrt.py"


def test_what_is_refused_is_written_down_beside_what_ran(tiny_bundle: Path, tmp_path: Path) -> None:
    flags = "--with-cpu --runs 1 --warm-ups 0 --new-tokens 2 --text-tokens 5".split()
    done = run_program([sys.executable, TOOL, tiny_bundle, *flags, "--out", tmp_path / "out"])
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out" / "bench_tensorrt.json").read_text())
    rows = {row["runner"]: row for row in facts["rows"]}
    assert list(rows) == [
        "tensorrt",
        "tensorrt_graphs",
        "onnxruntime_cuda",
        "pytorch_cuda",
        "onnxruntime_cpu",
    ]
    # The bundle has no engines, so this is refused on a GPU, too.
    assert rows["tensorrt"]["latency"] is None
    assert "no engines" in rows["tensorrt"]["refusal"]
    assert rows["onnxruntime_cpu"]["latency"]["decode_ms"] > 0
    assert rows["onnxruntime_cpu"]["num_prompt_tokens"] == 10
    table = (tmp_path / "out" / "bench_tensorrt.md").read_text()
    assert "CPUExecutionProvider, form ort) | 0.3 | 10 |" in table
    assert f"- tensorrt, {tiny_bundle.name}: " in table
