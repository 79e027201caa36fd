"""One bundle in a process of its own: ``python -m gap_export.benchmark.worker``.

It reads orders from stdin and writes a result for each to stdout, both a line of JSON, and ends
when stdin does. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from gap_export.benchmark import energy, machine
from gap_export.benchmark.questions import Round
from gap_export.benchmark.results import CPU, MANY, NEXT, PER_TOKEN, PREFIX, TOTAL
from gap_export.errors import GapExportError
from gap_export.runtime.prompt import PromptEncoder
from gap_export.runtime.session import GroundingSession
from gap_export.spec.requests import OpenVinoOptions


class Worker:
    """Runs orders; each method is one, its arguments and its result are JSON."""

    def __init__(self) -> None:
        self._session: GroundingSession | None = None
        self._prompts: PromptEncoder | None = None
        self._meter, self._meter_name = energy.find_meter()

    def open(
        self, *, bundle: str, arguments: Mapping[str, Any], answer_tokens: int | None
    ) -> dict[str, Any]:
        """Open a bundle, as :meth:`GroundingSession.open` takes it."""
        start = time.perf_counter()
        given = dict(arguments)
        if "openvino" in given:
            given["openvino"] = OpenVinoOptions(**given["openvino"])
        session = GroundingSession.open(bundle, **given)
        opened = time.perf_counter()
        manifest = session.manifest
        if answer_tokens is not None:
            prompt = replace(manifest.prompt, max_new_tokens=answer_tokens)
            decoder = replace(manifest.decoder, eos_token_ids=())
            session.manifest = replace(manifest, prompt=prompt, decoder=decoder)
        self._session, self._prompts = session, PromptEncoder(session.manifest, Path(bundle))
        return {"ms": 1e3 * (opened - start), "runs": session.backend.name}

    def ask(
        self,
        *,
        number: int,
        image: str | None,
        expressions: list[str],
        num_expressions: int,
    ) -> dict[str, Any]:
        """Answer the first expression alone, then, if there are more, all of them."""
        assert self._session is not None and self._prompts is not None, "nothing is open"
        asked = Round(
            number=number,
            image=None if image is None else Path(image),
            expressions=tuple(expressions),
            num_expressions=num_expressions,
        )
        shown, texts = asked.load()
        joules = self._meter.joules() if self._meter is not None else 0.0
        with machine.watched() as load:
            answer = self._session.ground(shown, texts[0])
        used = self._meter.joules() - joules if self._meter is not None else None
        stages = {**answer.timings_ms, TOTAL: 1e3 * load.wall_s, CPU: 1e3 * load.cpu_s}
        num_tokens = len(answer.token_ids)
        if num_tokens > 1:
            stages[PER_TOKEN] = answer.timings_ms["decode"] / (num_tokens - 1)
        others = [load.others]
        if len(texts) > 1:
            with machine.watched() as load:
                self._session.ground_batch(shown, texts)
            stages[MANY] = 1e3 * load.wall_s
            others.append(load.others)
            with self._session.look(shown) as view:
                view.ground(texts[0])
                with machine.watched() as load:
                    again = view.ground(texts[1])
            stages[NEXT] = 1e3 * load.wall_s
            stages[PREFIX] = max(0.0, answer.timings_ms["prefill"] - again.timings_ms["prefill"])
            others.append(load.others)
        encoded = self._prompts.encode(texts[0])
        num_text = len(encoded.prefix_ids) + len(encoded.suffix_ids)
        return {
            "number": number,
            "stages": stages,
            "others": max(others),
            "answer_tokens": num_tokens,
            "prompt_tokens": num_text + len(answer.keep_indices),
            "energy_j": used,
        }

    def memory(self) -> dict[str, int]:
        """What this process holds."""
        return asdict(machine.memory_of_this_process())

    def rates(self) -> dict[str, float]:
        """What this machine can do at this moment."""
        return {"gemm": machine.gemm_gflops(), "bandwidth": machine.bandwidth_gb_s()}

    def meter(self) -> str:
        """What energy is read from, or why it is not."""
        return self._meter_name

    def close(self) -> None:
        """End what is open."""
        if self._session is not None:
            self._session.close()
        if self._meter is not None:
            self._meter.close()


def serve(orders: TextIO, results: TextIO) -> None:
    """Run orders until there are no more."""
    worker = Worker()
    does: dict[str, Callable[..., Any]] = {
        name: getattr(worker, name) for name in ("open", "ask", "memory", "rates", "meter")
    }
    try:
        for line in orders:
            order = json.loads(line)
            try:
                reply = {"value": does[order["do"]](**order["with"])}
            except GapExportError as err:
                said = {key: getattr(err, key) for key in ("what", "seen", "allowed", "fix")}
                plain = {key: None if value is None else str(value) for key, value in said.items()}
                reply = {"error": type(err).__name__, "said": plain}
            results.write(json.dumps(reply) + "\n")
            results.flush()
    finally:
        worker.close()


def main() -> None:
    """Serve the process that started this one."""
    # Native code prints to descriptor 1; a result must stand alone there.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, own)


if __name__ == "__main__":
    main()
