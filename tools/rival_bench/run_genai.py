"""onnxruntime-genai, of the decoder alone in INT4, fed with token ids."""

from __future__ import annotations

from pathlib import Path

import onnxruntime_genai as og
from serve import LONG, NUM_DECODED, SHORT, serve, timed, token_ids


class GenAI:
    """See ``serve.Rival``."""

    def open(self, folder: Path, shape: Path) -> str:
        """See Rival."""
        del shape
        self.model = og.Model(str(folder / "model"))
        return f"onnxruntime-genai {og.__version__}, INT4"

    def stages(self, number: int) -> dict[str, float]:
        """See Rival."""
        found = {}
        for length in (LONG, SHORT):
            generator = self._generator(length + NUM_DECODED + 2)
            ids = token_ids(number, length)
            found[f"prefill {length}"], _ = timed(lambda g=generator, i=ids: self._prefill(g, i))
            decode, _ = timed(lambda g=generator: self._decode(g))
            found[f"decode {length}"] = decode / NUM_DECODED
        return found

    def logits(self, ids: list[int]) -> list[float]:
        """See Rival."""
        generator = self._generator(len(ids) + 2)
        generator.append_tokens(ids)
        return [float(one) for one in generator.get_logits().reshape(-1)[-32064:]]

    def _generator(self, length: int) -> og.Generator:
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=length, do_sample=False)
        return og.Generator(self.model, params)

    @staticmethod
    def _prefill(generator: og.Generator, ids: list[int]) -> None:
        generator.append_tokens(ids)
        generator.generate_next_token()

    @staticmethod
    def _decode(generator: og.Generator) -> None:
        for _ in range(NUM_DECODED):
            generator.generate_next_token()


if __name__ == "__main__":
    serve(GenAI())
