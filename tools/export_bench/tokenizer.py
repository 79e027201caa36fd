"""A tokenizer for a checkpoint of random weights, which has no words of its own."""

from __future__ import annotations

from pathlib import Path


def write_tokenizer(path: str) -> None:
    """Write a stand-in with LLaVA's special tokens."""
    from gap_export.families.common.checkpoints.random_weights import stand_in_tokenizer

    special = {"<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
    Path(path).write_bytes(stand_in_tokenizer(32064, special))
