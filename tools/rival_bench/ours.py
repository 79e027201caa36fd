"""Our bundles, in the terms in which rivals are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gap_export.benchmark.process import WorkerProcess
from gap_export.benchmark.results import MANY, NEXT, PER_TOKEN, TOTAL

# Name in the table, bundle and backend.
OURS = {
    f"{keep} {backend}": (f"int4-{keep}", backend)
    for keep in ("0.3", "1.0")
    for backend in ("onnxruntime", "openvino")
}
PRUNED, MANY_EXPRESSIONS = "0.3", 16
_LENGTHS = {"0.3": 289, "1.0": 692}
_ANSWER = 32
# One of RefShapes' that takes as many tokens as the table's lengths say.
_EXPRESSIONS = ("the small star", "the small cross")


def export_ours(shape: Path, work: Path) -> None:
    """Export what a CPU runs best, pruned and unpruned; what is there stays."""
    from gap_export import PruningRequest, WeightsRequest, export

    for keep in _LENGTHS:
        out = work / f"int4-{keep}"
        if not out.is_dir():
            export(
                # By its true place, which a bundle notes.
                str(shape.resolve()),
                PruningRequest(keep_ratio=float(keep)),
                weights=WeightsRequest(
                    dtype="int4", vision_dtype="int8", quantize_lm_head=True, runs_on="cpu"
                ),
                out=out,
            )


def open_ours(bundle: str, backend: str, work: Path) -> WorkerProcess:
    """A process that runs it."""
    worker = WorkerProcess()
    worker.do(
        "open",
        bundle=str(work / bundle),
        arguments={"backend": backend},
        answer_tokens=_ANSWER,
    )
    return worker


def stages_of(
    worker: WorkerProcess, name: str, number: int, *, num_expressions: int = 2
) -> dict[str, float]:
    """Milliseconds of one round, by the names that rivals use."""
    found: dict[str, Any] = worker.do(
        "ask",
        number=number,
        image=None,
        expressions=list(_EXPRESSIONS),
        num_expressions=num_expressions,
    )
    stages, length = found["stages"], _LENGTHS[name.split(maxsplit=1)[0]]
    named = {
        "tower": stages["vision_encoder"],
        f"prefill {length}": stages["prefill"],
        f"decode {length}": stages[PER_TOKEN],
        "answer": stages[TOTAL],
        "next answer": stages[NEXT],
    }
    if num_expressions > 2:
        named[f"{num_expressions} answers"] = stages[MANY]
    return named


def logits_of(ids: list[int], backend: str, work: Path) -> list[float]:
    """Of the token after those, by the decoder of the unpruned bundle."""
    import numpy as np

    from gap_export import GroundingSession
    from gap_export.runtime.generation import embed_tokens

    with GroundingSession.open(work / "int4-1.0", backend=backend) as session:
        embeds = embed_tokens(session.backend, np.array([ids]))
        slots = np.arange(len(ids))[None]
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones_like(slots),
            "position_ids": slots,
            "kept_positions": slots,
        }
        cache = session.backend.new_cache(1, len(ids) + 1)
        return [float(one) for one in session.backend.decode(feed, cache)[0]]
