"""Transformers' own LLaVA of the tiny checkpoint, whole and in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.llava_layouts import Pieces, take_apart


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(
        tiny_checkpoint, attn_implementation="eager"
    ).eval()


@pytest.fixture
def pieces(theirs: Any) -> Pieces:
    """Ones that a test may change."""
    return take_apart(theirs)
