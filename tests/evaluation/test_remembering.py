"""An image is encoded once for all settings of a bundle, and each is told what it would take."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.refshapes import iter_samples
from gap_export.evaluation.remembering import RememberingBackend
from gap_export.evaluation.settings import pruned_settings
from gap_export.runtime.backends.backend import Backend
from gap_export.runtime.session import GroundingSession


class Slow(Backend):
    """Counts what is run, each for some milliseconds."""

    name, dtype, continues_prompts = "slow", "float32", True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def run(self, component: str, feed: Any) -> Any:
        self.calls.append(component)
        time.sleep(0.005)
        return {"found": sum(values.sum() for values in feed.values()) + np.zeros(2)}

    def new_cache(self, batch_size: int, num_slots: int) -> Any:
        return batch_size, num_slots

    def fork_cache(self, cache: Any, batch_size: int, num_slots: int) -> Any:
        return cache, batch_size, num_slots

    def decode(self, feed: Any, cache: Any) -> Any:
        return feed, cache


def test_the_same_inputs_are_run_once():
    inner = Slow()
    backend = RememberingBackend(inner)
    feed = {"pixel_values": np.ones((1, 3, 2, 2), np.float32)}
    first, second = backend.run("vision_encoder", feed), backend.run("vision_encoder", feed)
    assert first["found"].tolist() == second["found"].tolist() == [12.0, 12.0]
    assert inner.calls == ["vision_encoder"] and backend.saved_ms["vision_encoder"] >= 5
    with pytest.raises(ValueError, match="read-only"):
        second["found"][0] = 1
    backend.forget_saved()
    for other in (
        {"pixel_values": np.ones((1, 3, 2, 2), np.float64)},
        {"pixel_values": np.ones((1, 3, 4, 1), np.float32)},
        {"pixel_values": feed["pixel_values"] * 2},
        feed | {"text_embeds": np.zeros((1, 1), np.float32)},
    ):
        backend.run("vision_encoder", other)
    backend.run("token_pruner", feed)
    assert len(inner.calls) == 6 and not backend.saved_ms
    for _ in range(2):
        backend.run("embed_tokens", feed)
    assert inner.calls[6:] == ["embed_tokens"] * 2
    assert backend.fork_cache(backend.new_cache(1, 2), 3, 4) == ((1, 2), 3, 4)
    assert backend.decode(1, 2) == (1, 2)  # type: ignore[arg-type,comparison-overlap]
    assert backend.continues_prompts


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_text_bundle"])
def test_compact_and_gap_share_the_tower_and_get_their_own_answers(name, request, monkeypatch):
    from gap_export.bundle import open_bundle

    bundle = request.getfixturevalue(name)
    settings = pruned_settings(bundle, open_bundle(bundle).manifest.pruning)
    samples = list(iter_samples(seed=5, num_samples=3))
    calls: list[str] = []
    honest: Any = RememberingBackend.run

    def run(self: Any, component: str, feed: Any) -> Any:
        inner = self._inner
        if not hasattr(inner, "watched"):
            inner.watched, plain = True, inner.run
            inner.run = lambda one, fed: calls.append(one) or plain(one, fed)
        return honest(self, component, feed)

    monkeypatch.setattr(RememberingBackend, "run", run)
    with Runner(RunnerOptions()) as runner:
        answers = {
            setting.positions: [
                runner.session(setting).ground(sample.image, sample.expression.text)
                for sample in samples
            ]
            for setting in settings
        }
    # Samples share images; of two texts the tiny model may know the same words.
    asked = {(s.image.tobytes(), s.expression.text * ("text" in name)) for s in samples}
    assert 1 <= calls.count("vision_encoder") <= len(asked)
    for positions, given in answers.items():
        with GroundingSession.open(bundle, positions=positions) as session:
            for sample, answer in zip(samples, given, strict=True):
                alone = session.ground(sample.image, sample.expression.text)
                assert (alone.token_ids, alone.keep_indices) == (
                    answer.token_ids,
                    answer.keep_indices,
                )
