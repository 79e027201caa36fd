"""OpenVINO GenAI of the whole model in INT4; its graphs one by one in OpenVINO for the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from serve import ANSWER, LONG, NUM_DECODED, SHORT, peak_bytes, pixels, serve, timed, token_ids

# Some 116 tokens with the template that the pipeline adds.
_QUESTION = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. Please provide the bounding "
    "box coordinate of the region this sentence describes: the {color} star"
)
# LLaVA-1.5's, without which the pipeline has no second question about an image.
_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{{ message['content'] }} ASSISTANT:{% else %}{{ message['content'] }}</s>{% endif %}"
    "{% endfor %}"
)


class OpenVinoGenAI:
    """See ``serve.Rival``."""

    def open(self, folder: Path, shape: Path) -> str:
        """See Rival."""
        del shape
        self.folder = folder / "model"
        self.pipeline = genai.VLMPipeline(str(self.folder), "CPU")
        self.pipeline.get_tokenizer().set_chat_template(_CHAT)
        self.requests: dict[str, Any] = {}
        self.peak: int | None = None
        return f"OpenVINO GenAI {genai.__version__}, INT4"

    def stages(self, number: int) -> dict[str, float]:
        """See Rival."""
        image = ov.Tensor(pixels(number)[None])
        found = {}
        self.pipeline.start_chat()
        found["answer"], _ = timed(lambda: self._ask("red", [image]))
        found["next answer"], _ = timed(lambda: self._ask("blue", []))
        self.pipeline.finish_chat()
        # What follows is loaded a second time, and no part of the pipeline's memory.
        self.peak = self.peak or peak_bytes()
        tower = self._request("openvino_vision_embeddings_model")
        shown = np.random.default_rng(number).standard_normal((1, 3, 336, 336), dtype=np.float32)
        found["tower"], _ = timed(lambda: tower.infer([shown]))
        for length in (LONG, SHORT):
            embeds = self._embeds(token_ids(number, length))
            language = self._request("openvino_language_model")
            language.reset_state()
            found[f"prefill {length}"], logits = timed(lambda e=embeds: self._step(e, 0))
            token, spent = int(logits.argmax()), 0.0
            for step in range(NUM_DECODED):
                embeds = self._embeds([token])
                ms, logits = timed(lambda e=embeds, at=length + step: self._step(e, at))
                token, spent = int(logits.argmax()), spent + ms
            found[f"decode {length}"] = spent / NUM_DECODED
        return found

    def logits(self, ids: list[int]) -> list[float]:
        """See Rival."""
        self._request("openvino_language_model").reset_state()
        return [float(one) for one in self._step(self._embeds(ids), 0)]

    def _ask(self, color: str, images: list[ov.Tensor]) -> None:
        config = genai.GenerationConfig(max_new_tokens=ANSWER, ignore_eos=True)
        more = {"images": images} if images else {}
        self.pipeline.generate(_QUESTION.format(color=color), generation_config=config, **more)

    def _request(self, name: str) -> Any:
        if name not in self.requests:
            model = ov.Core().compile_model(str(self.folder / f"{name}.xml"), "CPU")
            self.requests[name] = model.create_infer_request()
        return self.requests[name]

    def _embeds(self, ids: list[int]) -> np.ndarray[Any, Any]:
        found = self._request("openvino_text_embeddings_model").infer([np.array([ids])])
        return np.array(next(iter(found.values())))

    def _step(self, embeds: np.ndarray[Any, Any], past: int) -> np.ndarray[Any, Any]:
        num = embeds.shape[1]
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, past + num), np.int64),
            "position_ids": np.arange(past, past + num)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found = self._request("openvino_language_model").infer(feed)
        return np.array(next(iter(found.values())))[0, -1]


if __name__ == "__main__":
    serve(OpenVinoGenAI())
