"""Record what a session asks of one backend, and replay it on another.

Both backends then see identical inputs at every step, so that each output's difference is its
own and not one inherited from an earlier stage. Only the KV cache is the candidate's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from gap_export.runtime.backends.backend import (
    DECODER,
    VISION,
    Backend,
    Feed,
    FloatArray,
    KVCache,
    Outputs,
)

# Stands for the component where a call only made an empty cache.
NEW_CACHE = "new_cache"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a backend.

    Attributes:
        component: What was run, or :data:`NEW_CACHE`, whose input is batch_size int64 [1].
        inputs: With what, by name.
        outputs: What it gave, by name.
        margins: Where tokens were chosen one by one, by how much the closest choice was decided,
            float32 [B]: of two that rounding alone tells apart another backend may choose the
            other. None where that is not known.
    """

    component: str
    inputs: Outputs
    outputs: Outputs
    margins: NDArray[np.float32] | None = None

    @property
    def is_decode(self) -> bool:
        """Whether it ran the decoder, be it prefill or a step."""
        return self.component == DECODER


class RecordingBackend(Backend):
    """Passes every call on to another backend and keeps it in ``calls``.

    It leaves ``continues_prompts`` false, so that what is recorded is one question's alone.

    Args:
        inner: Runs the model.
        margins: Gives those of a call of the vision encoder; None: they are not asked for.
    """

    def __init__(
        self, inner: Backend, *, margins: Callable[[Feed], NDArray[np.float32] | None] | None = None
    ) -> None:
        self.name, self.dtype, self.quantization = inner.name, inner.dtype, inner.quantization
        self.activations = inner.activations
        self.inference_precision = inner.inference_precision
        self.calls: list[Call] = []
        self._inner, self._margins = inner, margins

    def close(self) -> None:
        """See Backend."""
        self._inner.close()

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        outputs = self._inner.run(component, feed)
        chooses = component == VISION and "keep_indices" in outputs
        margins = self._margins(feed) if chooses and self._margins is not None else None
        self._keep(component, feed, outputs, margins)
        return outputs

    def new_cache(self, batch_size: int, num_slots: int) -> KVCache:
        """See Backend."""
        self._keep(NEW_CACHE, {"batch_size": np.array([batch_size], dtype=np.int64)}, {})
        return self._inner.new_cache(batch_size, num_slots)

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        logits = self._inner.decode(feed, cache)
        self._keep(DECODER, feed, {"logits": logits})
        return logits

    def _keep(
        self,
        component: str,
        inputs: Feed,
        outputs: Feed,
        margins: NDArray[np.float32] | None = None,
    ) -> None:
        self.calls.append(
            Call(
                component=component,
                inputs={name: np.array(values) for name, values in inputs.items()},
                outputs={name: np.array(values) for name, values in outputs.items()},
                margins=margins,
            )
        )


def replay(calls: Sequence[Call], candidate: Backend) -> list[Outputs]:
    """Outputs of the candidate for each recorded call, in order."""
    found: list[Outputs] = []
    cache: KVCache | None = None
    for place, call in enumerate(calls):
        if call.component == NEW_CACHE:
            # All tokens that it is fed before the next one is made.
            of_cache = takewhile(lambda later: later.component != NEW_CACHE, calls[place + 1 :])
            fed = (later.inputs["inputs_embeds"] for later in of_cache if later.is_decode)
            num_slots = sum(embeds.shape[1] for embeds in fed)
            cache = candidate.new_cache(int(call.inputs["batch_size"][0]), num_slots)
            found.append({})
        elif call.is_decode:
            assert cache is not None, "a session decodes only with a cache"
            found.append({"logits": candidate.decode(call.inputs, cache)})
        else:
            found.append(candidate.run(call.component, call.inputs))
    return found
