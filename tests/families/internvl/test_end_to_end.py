"""Bundles of InternVL against transformers: prompts, logits, answers, and the exact oracle.

The oracle: what is pruned with original ids equals what is not pruned, its dropped tokens hidden.
Transformers' own model is the truth; ONNX Runtime runs the bundle's graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gap_export.bundle import open_bundle
from gap_export.exporting import ExportOptions, export_model
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.generation import PromptRow, assemble_prompt, generate
from gap_export.runtime.images.image import prepare_image
from gap_export.runtime.session import GroundingSession
from gap_export.spec.requests import PruningRequest
from tests.families.internvl.conftest import Model, noise
from tests.families.tiny_internvl import GRID, special_tokens, their_tokenizer

ATOL = 1e-4
STEPS = 20
N = GRID * GRID
# (width, height): 3 x 2 and 2 x 3 tiles, 1 x 6, one tile.
IMAGES = [(96, 64), (64, 96), (200, 30), (40, 40)]
# Kept of each tile, thumbnail last: none, one, many; the last token of the thumbnail is dropped.
KEPT = [[0, 5, 6], [], [2, 3, 7, 8, 9, 10, 15], [15], [0, 1], list(range(N)), [1, 4, 13]]


# By default a demo model has the other decoder, and tests/parity/test_tile_mutants the other form.
pytestmark = pytest.mark.parametrize(
    "model",
    ["qwen3", pytest.param("qwen2", marks=pytest.mark.full)],
    indirect=True,
    scope="session",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Exported:
    """A model, and its bundle that drops nothing."""

    model: Model
    bundle: Path
    session: GroundingSession
    rows: list[PromptRow]

    def row(self, image: Image.Image, expression: str = "the lady") -> PromptRow:
        """The prompt as it is fed, all visual tokens in it."""
        self.rows.clear()
        self.session.ground(image, expression)
        return self.rows[0]


@pytest.fixture(scope="module")
def exported(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    export_model(
        ExportOptions(
            model=str(model.folder),
            pruning=PruningRequest(pruner="spatial", keep_ratio=1.0),
            out=out,
        )
    )
    rows: list[PromptRow] = []

    def remember(_: str, row: PromptRow) -> PromptRow:
        rows.append(row)
        return row

    manifest = open_bundle(out).manifest
    with (
        OnnxRuntimeBackend(open_bundle(out)) as backend,
        GroundingSession(manifest, out, backend, edit_row=remember) as session,
    ):
        yield Exported(model=model, bundle=out, session=session, rows=rows)


def their_inputs(model: Model, image: Image.Image, expression: str) -> dict[str, torch.Tensor]:
    """What transformers' model takes: tokens expanded as its processor does, and tiles."""
    pixels, _ = prepare_image(image, model.recipe.image)
    inside = "<IMG_CONTEXT>" * (N * len(pixels))
    prompt = model.recipe.prompt.template.replace("{expression}", expression)
    ids = their_tokenizer(model.folder)(prompt.replace("<IMG_CONTEXT>", inside))["input_ids"]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.from_numpy(pixels)}


def logits_of(exported: Exported, rows: list[PromptRow], tokens: Any, **how: Any) -> np.ndarray:
    """[B, steps, V] of the bundle's graphs, tokens [B, steps] forced."""
    prompt = assemble_prompt(rows, **{"positions": "gap", "position_axes": 1, **how})
    answer = generate(
        exported.session.backend,
        prompt,
        max_new_tokens=1,
        eos_token_ids=(0,),
        forced_tokens=np.asarray(tokens),
        keep_logits=True,
    )
    assert answer.logits is not None
    return answer.logits


def forced(num_rows: int = 1) -> np.ndarray:
    return np.random.default_rng(5).integers(1, 250, size=(num_rows, STEPS + 1))


@pytest.mark.parametrize("size", IMAGES)
def test_prompt_and_logits_of_twenty_steps_equal_transformers(exported: Exported, size):
    image, expression = noise(size), "the lady, 2nd from left"
    inputs = their_inputs(exported.model, image, expression)
    row = exported.row(image, expression)
    image_ids = (inputs["input_ids"][0] == special_tokens()["<IMG_CONTEXT>"]).nonzero()[:, 0]
    assert len(row.prefix_embeds) == image_ids[0]
    assert len(row.suffix_embeds) == inputs["input_ids"].shape[1] - image_ids[-1] - 1
    assert row.num_visual_tokens == len(image_ids) == len(row.keep_indices)
    tokens = forced()
    follows = torch.from_numpy(tokens[:, :-1])
    with torch.inference_mode():
        ids = torch.cat([inputs["input_ids"], follows], dim=1)
        theirs = exported.model.theirs(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    wanted = theirs[:, -STEPS - 1 :].numpy()
    assert wanted.std() > 0.5
    assert np.abs(logits_of(exported, [row], tokens) - wanted).max() <= ATOL


@pytest.mark.parametrize("number", [12, pytest.param(200, marks=pytest.mark.full)])
def test_greedy_answers_equal_transformers_with_nothing_pruned(exported: Exported, number: int):
    limit = exported.session.manifest.prompt.max_new_tokens
    sides = np.random.default_rng(0).integers(20, 200, size=(number, 2)).tolist()
    answers = set()
    for width, height in sides:
        image, expression = noise((width, height)), f"the {width}th lady"
        ours = exported.session.ground(image, expression)
        inputs = their_inputs(exported.model, image, expression)
        with torch.inference_mode():
            theirs = exported.model.theirs.generate(**inputs, max_new_tokens=limit, do_sample=False)
        assert list(ours.token_ids) == theirs[0, inputs["input_ids"].shape[1] :].tolist()
        answers.add(ours.token_ids)
    # Images and expressions have a part in them.
    assert len(answers) > number // 4


def pruned(row: PromptRow, kept: list[list[int]]) -> PromptRow:
    """The prompt with these of each tile alone."""
    keep = np.array([tile * N + index for tile, few in enumerate(kept) for index in few])
    return replace(row, image_features=row.image_features[keep], keep_indices=keep)


def masked(exported: Exported, row: PromptRow, keep: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[1, steps, V] of transformers: all is fed with plain ids, what is dropped hidden from all."""
    theirs, start = exported.model.theirs, len(row.prefix_embeds)
    text = torch.from_numpy(tokens[:, :-1])
    with torch.inference_mode():
        fed = [row.prefix_embeds, row.image_features, row.suffix_embeds]
        follows = theirs.get_input_embeddings()(text)
        embeds = torch.cat([torch.from_numpy(np.concatenate(fed))[None], follows], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        mask[0, start : start + row.num_visual_tokens] = 0
        mask[0, start + torch.from_numpy(keep)] = 1
        hidden = theirs.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=torch.arange(embeds.shape[1])[None],
        ).last_hidden_state
        found: np.ndarray = theirs.lm_head(hidden[:, -STEPS - 1 :]).numpy()
    return found


# Tiles down and across, each of both below and above the other.
@pytest.mark.parametrize("size", [(96, 64), (64, 96)])
def test_pruned_equals_unpruned_with_dropped_tokens_hidden(exported: Exported, size):
    whole, tokens = exported.row(noise(size)), forced()
    row = pruned(whole, KEPT)
    truth = masked(exported, whole, row.keep_indices, tokens)
    assert np.abs(truth).max() > 0.5
    assert np.abs(logits_of(exported, [row], tokens) - truth).max() <= ATOL
    for rule in ("compact", "text-shifted"):
        off = np.abs(logits_of(exported, [row], tokens, positions=rule) - truth).max()
        assert off > 0.1, rule
    # As if the thumbnail came first, as LLaVA-1.6 has it.
    moved = (row.keep_indices + N) % row.num_visual_tokens
    order = np.argsort(moved)
    first = replace(row, image_features=row.image_features[order], keep_indices=moved[order])
    assert np.abs(logits_of(exported, [first], tokens) - truth).max() > 0.1


def test_with_the_thumbnail_s_last_token_kept_text_shifted_is_right(exported: Exported):
    """Which is why the kept tokens above leave it out."""
    whole, tokens = exported.row(noise((96, 64))), forced()
    row = pruned(whole, [*KEPT[:-1], [1, N - 1]])
    shifted = logits_of(exported, [row], tokens, positions="text-shifted")
    assert np.abs(shifted - logits_of(exported, [row], tokens)).max() <= ATOL


def test_rows_of_a_padded_batch_equal_the_rows_alone(exported: Exported):
    rows = [
        pruned(exported.row(noise((96, 64))), KEPT),
        exported.row(noise((40, 40)), "it"),
        pruned(exported.row(noise((64, 32)), "the man behind her"), [[0, 9], [3], [2, 14]]),
    ]
    tokens = np.repeat(forced(), len(rows), axis=0)
    batch = logits_of(exported, rows, tokens)
    for index, row in enumerate(rows):
        alone = logits_of(exported, [row], tokens[:1])
        assert np.abs(batch[index] - alone[0]).max() <= ATOL


def test_all_tokens_kept_gap_and_compact_are_the_same(exported: Exported):
    row, tokens = exported.row(noise((64, 96))), forced()
    gap, compact = (logits_of(exported, [row], tokens, positions=p) for p in ("gap", "compact"))
    assert np.array_equal(gap, compact)
