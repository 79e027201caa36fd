"""Samples and reports that are made up."""

from __future__ import annotations

from gap_export.benchmark.results import BenchReport, BenchRow, MachineFacts, Memory
from gap_export.benchmark.samples import Sample, speedups, stage_spreads


def sample(number, total, *, others=0.0, **stages):
    return Sample(
        number=number,
        stages={"prefill": total / 2, "total": total, **stages},
        others=others,
        answer_tokens=5,
        prompt_tokens=100,
    )


def row_of(name, samples, *, unpruned=(), **changes):
    plain = {
        "name": name,
        "bundle": f"/bundles/{name}",
        "backend": "ort",
        "runs": "ONNX Runtime",
        "dtype": "float32",
        "keep_ratio": 0.3,
        "prompt_tokens": 50.0,
        "answer_tokens": 5.0,
        "stages": stage_spreads(samples),
        "open_ms": (900.0, 400.0),
        "first_call_ms": 30.0,
        "num_busy": 0,
        "memory": Memory(peak=300 << 20, steady=200 << 20, own=100 << 20),
        "gemm_share": 0.5,
        "bandwidth_share": 0.25,
        "speedup": speedups(unpruned, samples) if unpruned else {},
        "ideal": 2.0 if unpruned else None,
    }
    return BenchRow(**{**plain, **changes})


WHOLE = [sample(n, 100.0 + n) for n in range(5)]
PRUNED = [sample(n, 40.0 + n) for n in range(5)]


def report_of(**changes):
    plain = {
        "model": "refshapes-llava",
        "rounds": 5,
        "expressions": 1,
        "machine": MachineFacts(
            processor="a processor",
            num_cpus=2,
            gemm_gflops=400.0,
            bandwidth_gb_s=70.0,
            others_share=0.01,
            energy="not measured: no meter",
        ),
        "warnings": (),
        "rows": (
            row_of("whole", WHOLE, keep_ratio=1.0),
            row_of("pruned", PRUNED, unpruned=WHOLE),
        ),
        "recommended": {},
    }
    return BenchReport(**{**plain, **changes})
