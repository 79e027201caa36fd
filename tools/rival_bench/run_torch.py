"""transformers in PyTorch: ``run_torch.py float32|bfloat16``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from serve import ANSWER, LONG, NUM_DECODED, SHORT, pixels, serve, timed, token_ids
from transformers import DynamicCache, LlavaForConditionalGeneration


class Torch:
    """See ``serve.Rival``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def open(self, folder: Path, shape: Path) -> str:
        """See Rival."""
        del folder
        self.model = LlavaForConditionalGeneration.from_pretrained(shape, dtype=self.dtype).eval()
        self.language = self.model.model.language_model
        versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
        return f"{versions}, {str(self.dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def stages(self, number: int) -> dict[str, float]:
        """See Rival."""
        shown = torch.from_numpy(pixels(number)).permute(2, 0, 1)[None].to(self.dtype) / 255
        tower, features = timed(lambda: self._features(shown))
        found = {"tower": tower}
        for length in (LONG, SHORT):
            embeds = self._embeds(token_ids(number, length))
            cache = DynamicCache(config=self.model.config.text_config)
            found[f"prefill {length}"], token = timed(lambda e=embeds, c=cache: self._step(e, c))
            decode, _ = timed(lambda t=token, c=cache: self._decode(t, c, NUM_DECODED))
            found[f"decode {length}"] = decode / NUM_DECODED
        embeds = self._embeds(token_ids(number, LONG))
        embeds[:, 35 : 35 + features.shape[-2]] = features
        found["answer"] = tower + self._answer(embeds)
        found["next answer"] = self._answer(embeds)
        return found

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> list[float]:
        """See Rival."""
        hidden = self.language(inputs_embeds=self._embeds(ids)).last_hidden_state[0, -1]
        return [float(one) for one in self.model.lm_head(hidden).float()]

    def _features(self, shown: torch.Tensor) -> torch.Tensor:
        found: Any = self.model.model.get_image_features(pixel_values=shown)
        found = getattr(found, "pooler_output", found)
        return torch.cat(list(found)) if isinstance(found, (tuple, list)) else found

    def _embeds(self, ids: list[int]) -> torch.Tensor:
        return self.language.embed_tokens(torch.tensor([ids]))

    def _step(self, embeds: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        out = self.language(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        return self.model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)

    def _decode(self, token: torch.Tensor, cache: DynamicCache, num: int) -> None:
        for _ in range(num):
            token = self._step(self.language.embed_tokens(token[:, None]), cache)

    def _answer(self, embeds: torch.Tensor) -> float:
        def answer() -> None:
            cache = DynamicCache(config=self.model.config.text_config)
            self._decode(self._step(embeds, cache), cache, ANSWER - 1)

        return timed(answer)[0]


if __name__ == "__main__":
    serve(Torch(getattr(torch, sys.argv[1])))
