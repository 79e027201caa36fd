"""llama.cpp by llama-cpp-python, of the decoder alone in Q4_0, fed with token ids."""

from __future__ import annotations

import os
from pathlib import Path

import llama_cpp
import numpy as np
from serve import LONG, NUM_DECODED, SHORT, serve, timed, token_ids

_ROOM = 1024


class LlamaCpp:
    """See ``serve.Rival``."""

    def open(self, folder: Path, shape: Path) -> str:
        """See Rival."""
        del shape
        threads = len(os.sched_getaffinity(0))
        self.model = llama_cpp.Llama(
            str(folder / "model.gguf"),
            n_ctx=_ROOM,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        return f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), Q4_0"

    def stages(self, number: int) -> dict[str, float]:
        """See Rival."""
        found = {}
        for length in (LONG, SHORT):
            self.model.reset()
            ids = token_ids(number, length)
            found[f"prefill {length}"], token = timed(lambda i=ids: self._step(i))
            spent = 0.0
            for _ in range(NUM_DECODED):
                ms, token = timed(lambda t=token: self._step([t]))
                spent += ms
            found[f"decode {length}"] = spent / NUM_DECODED
        return found

    def logits(self, ids: list[int]) -> list[float]:
        """See Rival."""
        self.model.reset()
        self.model.eval(ids)
        return [float(one) for one in self._last()]

    def _step(self, ids: list[int]) -> int:
        self.model.eval(ids)
        return int(self._last().argmax())

    def _last(self) -> np.ndarray:
        found = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return np.ctypeslib.as_array(found, shape=(self.model.n_vocab(),))


if __name__ == "__main__":
    serve(LlamaCpp())
