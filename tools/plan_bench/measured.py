"""Bundles measured one by one, in one thread: the least processor time of each stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gap_export.benchmark.process import WorkerProcess
from gap_export.bundle import open_bundle

_WORKER = Path(__file__).with_name("worker.py")
_TOKENS = 12
# Billions of multiply-adds take seconds, and vary less.
_LARGE, _FEW, _MANY = 1 << 28, 2, 12


def measure_bundle(path: Path) -> dict[str, Any]:
    """One row: what the bundle is, and milliseconds by stage."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    size = sum(file.size for file in manifest.files)
    rounds = _FEW if size > _LARGE else _MANY
    with WorkerProcess(1, command=[sys.executable, str(_WORKER)]) as worker:
        worker.do(
            "open",
            bundle=str(path.absolute()),
            arguments={"backend": "onnxruntime", "num_threads": 1},
            answer_tokens=_TOKENS,
        )
        rates, samples = [worker.do("rates")], []
        for number in range(rounds):
            question = {"image": None, "expressions": [], "num_expressions": 1}
            samples.append(worker.do("ask", number=number, **question))
        rates.append(worker.do("rates"))
    first = samples[0]
    return {
        "bundle": path.name,
        "model": manifest.model.name,
        "pruner": manifest.pruning.pruner,
        "keep_ratio": manifest.pruning.keep_ratio,
        "floats": manifest.dtype,
        "int4": manifest.graph("decoder_model_merged").quantization is not None,
        "prompt_tokens": min(one["prompt_tokens"] for one in samples),
        "answer_tokens": first["answer_tokens"],
        "rounds": rounds,
        "gemm": max(one["gemm"] for one in rates),
        "bandwidth": max(one["bandwidth"] for one in rates),
        "stages": {
            name: min(one["stages"][name] for one in samples)
            for name in ("vision_encoder", "prefill", "decode_token")
        },
    }
