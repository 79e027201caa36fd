"""The steps of a session, in the order in which they are done. Each leaves a record.

Bundles are of the demo model, which has learned to ground, and of a random one of 1.1 billion
weights, whose speed is that of a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pages import DEMO_MODEL
from tensorrt_bench.runners import pytorch
from tensorrt_bench.timing import Workload, measure

import gap_export
from gap_export import EnginesRequest, PruningRequest, WeightsRequest
from gap_export.bundle import open_bundle
from gap_export.engines.command import describe_folders
from gap_export.engines.folder import engine_folders, read_engine_folder
from gap_export.engines.library import target_for
from gpu_steps.asking import compare
from gpu_steps.place import Place
from gpu_steps.record import Figures, NotRunError, StepRecord

KEEPS = (1.0, 0.5, 0.3)
DTYPES = ("float16", "bfloat16", "int4")
PRUNED = "demo-0.3-float32"
# A pruner that needs no scores, so that a random model keeps as many tokens as a real one.
_PRUNER = "spatial"
# Of every answer of a benchmark, so that bundles are compared over equal lengths.
_ANSWER_TOKENS = 16
_TORCH_NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """One part of a session.

    Attributes:
        name: What the command line calls it.
        title: For people.
        limit_s: It is stopped after that long.
        work: Does it.
    """

    name: str
    title: str
    limit_s: float
    work: Callable[[Place, StepRecord], None]


def environment(place: Place, record: StepRecord) -> None:
    """What is on this machine, without what names its owner."""
    from gap_export.cli._machine import describe_machine
    from gap_export.cli._redact import redact

    record.do("machine", lambda: redact(describe_machine()))

    def gpu() -> Figures:
        found = place.need_gpu()
        return {
            "name": found.name,
            "compute_capability": found.compute_capability,
            "memory_bytes": found.memory_bytes,
        }

    record.do("GPU", gpu)


def bundles(place: Place, record: StepRecord) -> None:
    """Export all that later steps run, from weights that are at hand."""
    for keep in KEEPS:
        _export(place, record, f"demo-{keep:g}-float32", keep, "float32", DEMO_MODEL)
    for dtype in DTYPES:
        _export(place, record, f"demo-0.3-{dtype}", 0.3, dtype, DEMO_MODEL)
    model = _shape(place, record)
    for keep in KEEPS:
        _export(place, record, f"shape-{keep:g}", keep, None, model)


def cuda(place: Place, record: StepRecord) -> None:
    """ONNX Runtime's CUDA provider against the CPU's, with both forms of the graphs."""
    for keep in KEEPS:
        name = f"demo-{keep:g}-float32"
        for form in ("base", "ort"):
            run = partial(_on_provider, place, name, name, form)
            record.do(f"{name}, form {form}", run)


def dtypes(place: Place, record: StepRecord) -> None:
    """Smaller dtypes in the CUDA provider, against float32 on the CPU."""
    for dtype in DTYPES:
        for form in ("base", "ort"):
            run = partial(_on_provider, place, f"demo-0.3-{dtype}", PRUNED, form)
            record.do(f"{dtype}, form {form}", run)


def engines(place: Place, record: StepRecord) -> None:
    """Build TensorRT engines for this card, where a TensorRT does, and compare what they answer."""
    for kind, model in (("demo", DEMO_MODEL), ("shape", _shape(place, record))):
        for keep in KEEPS:
            name = f"{kind}-{keep:g}-trt"
            built = record.do(
                f"{name}: build", lambda n=name, k=keep, m=model: _build(place, n, k, m)
            )
            if built is None or kind == "shape":
                continue
            plain = f"demo-{keep:g}-float32"
            for graphs in (False, True):
                title = f"{name}: run" + (", CUDA graphs" if graphs else "")
                record.do(title, partial(_on_engines, place, name, plain, graphs))


def check(place: Place, record: StepRecord) -> None:
    """`gap-export check` against PyTorch: ids, tensors, tokens and boxes."""
    for dtype in ("float32", *DTYPES):
        record.do(f"ort, {dtype}", partial(_check, place, f"demo-0.3-{dtype}", "ort"))
    for keep in KEEPS:
        record.do(f"trt, keep {keep:g}", partial(_check, place, f"demo-{keep:g}-trt", "trt"))


def torch_speed(place: Place, record: StepRecord) -> None:
    """PyTorch's decoder on the GPU: what keeping fewer tokens buys without any export."""
    for kind in ("demo", "shape"):
        for keep in KEEPS:
            name = f"demo-{keep:g}-float32" if kind == "demo" else f"shape-{keep:g}"
            record.do(f"{kind}, keep {keep:g}", partial(_in_torch, place, name))


def bench_demo(place: Place, record: StepRecord) -> None:
    """`gap-export bench` of the demo model, at each keep ratio."""
    _bench(place, record, "demo", "-float32")


def bench_shape(place: Place, record: StepRecord) -> None:
    """`gap-export bench` of the random model, at each keep ratio."""
    _bench(place, record, "shape", "")


def _steps() -> Iterator[Step]:
    # Together less than the 12 minutes that a session takes at most.
    for name, title, limit_s, work in (
        ("environment", "The machine", 30, environment),
        ("bundles", "Bundles", 140, bundles),
        ("cuda", "CUDA provider against the CPU", 60, cuda),
        ("dtypes", "Smaller dtypes in the CUDA provider", 40, dtypes),
        ("engines", "TensorRT engines", 170, engines),
        ("check", "check", 70, check),
        ("torch", "PyTorch's decoder", 60, torch_speed),
        ("bench-demo", "bench, demo model", 50, bench_demo),
        ("bench-shape", "bench, random model of 1.1 B", 100, bench_shape),
    ):
        yield Step(name=name, title=title, limit_s=limit_s, work=work)


STEPS: Mapping[str, Step] = {step.name: step for step in _steps()}


def _shape(place: Place, record: StepRecord) -> str:
    """The random model's checkpoint; in a rehearsal the demo model stands for it."""
    write = place.shape
    if write is None:
        return DEMO_MODEL
    folder = place.folder / "shape"

    def work() -> Figures:
        write(folder)
        return {"bytes": sum(file.stat().st_size for file in folder.iterdir())}

    record.do("weights of the random model", work)
    return str(folder)


def _export(
    place: Place, record: StepRecord, name: str, keep: float, dtype: str | None, model: str
) -> None:
    def work() -> Figures:
        out = place.folder / "bundles" / name
        if not out.is_dir():
            gap_export.export(
                model,
                PruningRequest(keep_ratio=keep, pruner=_PRUNER),
                weights=WeightsRequest(dtype=dtype),  # type: ignore[arg-type]
                out=out,
            )
        return {"kept_tokens": open_bundle(out).manifest.pruning.num_emitted_tokens}

    record.do(name, work)


def _build(place: Place, name: str, keep: float, model: str) -> Figures:
    target = target_for(place.need_gpu().compute_capability)
    out = place.folder / "bundles" / name
    if not out.is_dir():
        gap_export.export(
            model,
            PruningRequest(keep_ratio=keep, pruner=_PRUNER),
            engines=EnginesRequest(targets=(target.spec,)),
            out=out,
        )
    bundle = open_bundle(out)
    if not engine_folders(bundle):
        gap_export.build(out, [target.spec])
    folders = [read_engine_folder(bundle, each) for each in engine_folders(bundle)]
    return {"target": target.spec, "engines": [_without_path(r) for r in describe_folders(folders)]}


def _without_path(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "file": Path(row["file"]).name}


def _on_provider(place: Place, name: str, reference: str, form: str) -> Figures:
    provider = place.need_provider()
    return compare(
        place.bundle(name),
        place.bundle(reference),
        place.samples,
        runs_in=provider,
        execution_providers=[provider],
        form=form,
    )


def _on_engines(place: Place, name: str, reference: str, cuda_graphs: bool) -> Figures:
    return compare(
        place.bundle(name),
        place.bundle(reference),
        place.samples,
        runs_in="TensorRT",
        backend="tensorrt",
        cuda_graphs=cuda_graphs,
    )


def _check(place: Place, name: str, backend: str) -> Figures:
    runs_in = place.need_provider() if backend == "ort" else "TensorRT"
    report = gap_export.check(place.bundle(name), backends=[backend], samples=place.samples)
    # One of each form of the graphs that the bundle has.
    forms = [found for found in report.backends if runs_in in found.name]
    if not forms:
        told = [level.reason for found in report.backends for level in found.levels]
        names = [found.name for found in report.backends if found.name]
        raise NotRunError("; ".join(dict.fromkeys([*names, *filter(None, told)])))
    return {
        "n": report.questions,
        "forms": [
            {
                "runs": found.name,
                "levels": {level.level: level.status for level in found.levels},
                "reasons": [level.reason for level in found.levels if level.reason],
                "figures": {level.level: dict(level.figures) for level in found.levels},
            }
            for found in forms
        ],
    }


def _in_torch(place: Place, name: str) -> Figures:
    bundle = place.bundle(name)
    manifest = open_bundle(bundle).manifest
    workload = Workload.of(manifest, num_text_tokens=59, num_new_tokens=_TORCH_NEW_TOKENS)
    with pytorch(bundle, place.torch_device) as (runs, decoder):
        latency = measure(decoder, workload, warm_ups=2, runs=place.rounds)
    return {
        "runs": runs,
        "n": place.rounds,
        "prompt_tokens": workload.num_prompt_tokens,
        "first_ms": latency.first_ms,
        "prefill_ms": latency.prefill_ms,
        "decode_ms": latency.decode_ms,
    }


def _bench(place: Place, record: StepRecord, kind: str, suffix: str) -> None:
    """In the CUDA provider, and with engines where they were built."""

    def in_provider() -> Figures:
        provider = place.need_provider()
        found = _measure(place, [f"{kind}-{keep:g}{suffix}" for keep in KEEPS], "ort")
        others = [row["runs"] for row in found["rows"] if provider not in row["runs"]]
        if others:
            raise NotRunError(f"it ran in {others[0]}, and not in {provider}")
        return found

    def with_engines() -> Figures:
        place.need_gpu()
        return _measure(place, [f"{kind}-{keep:g}-trt" for keep in KEEPS], "trt")

    record.do("ort", in_provider)
    record.do("trt", with_engines)


def _measure(place: Place, names: list[str], backend: str) -> Figures:
    whole, *pruned = [place.bundle(name) for name in names]
    report = gap_export.bench(
        pruned,
        unpruned=whole,
        backends=(backend,),
        rounds=place.rounds,
        answer_tokens=_ANSWER_TOKENS,
    )
    found = report.to_plain()
    for row in found["rows"]:
        row["bundle"] = Path(row["bundle"]).name
    return found
