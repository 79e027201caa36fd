"""References for checks of the tiny bundle."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.parity import check as check_module
from gap_export.parity.inside.look import Inside
from gap_export.parity.question import Question
from gap_export.parity.truth import TorchTruth


@pytest.fixture(scope="session")
def questions():
    rng = np.random.default_rng(0)
    texts = ["the red circle", "the big blue square", "object"]
    return [
        Question(
            image=rng.integers(0, 256, (40, 32, 3), dtype=np.uint8),
            expression=text,
            box=(0.0, 0.0, 16.0, 20.0),
        )
        for text in texts
    ]


@pytest.fixture(scope="session")
def ask_torch(tiny_recipe, tiny_checkpoint):
    """A reference for some questions."""
    return partial(TorchTruth, tiny_recipe, Checkpoint.of(tiny_checkpoint))


@pytest.fixture(scope="session")
def truth(ask_torch, questions):
    """Asked once for all tests that do not change it."""
    return ask_torch(questions)


@pytest.fixture
def blind(monkeypatch):
    """Where a difference begins is not looked for."""
    monkeypatch.setattr(check_module, "look_inside", lambda *_, **__: Inside())
