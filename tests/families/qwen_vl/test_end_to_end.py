"""Bundles of Qwen's models against transformers: the exact oracle, and answers.

The oracle: what is pruned with original ids equals what is not pruned, its dropped tokens hidden.
Transformers' own model is the truth, fed all tokens and its own ids; ONNX Runtime runs the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import gap_export
from gap_export.bundle import open_bundle
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.generation import PromptRow, assemble_prompt, embed_tokens, generate
from gap_export.runtime.images.image import prepare_image
from gap_export.runtime.session import GroundingSession
from gap_export.spec.requests import PruningRequest
from tests.families.qwen_vl.tiny import (
    CANVASES,
    IMAGE,
    LICENSE_NOTE,
    MERGE,
    PATCH,
    TOKEN,
    Tiny,
    patches_of,
    stand_in_prompt,
    tower_outputs,
)

ATOL = 1e-4
# What a wrong id, or a wrong plane, is off by at least, in logits of a standard deviation of 1.
OFF = 0.1
HIDDEN = 64
STEPS = np.random.default_rng(2).integers(5, 250, size=(1, 20))
# Rows of the grid's tokens that are kept: of 3 x 5 and of 7 x 3.
KEPT = {
    "rows < cols": {
        "no last lines": [0, 2, 3, 6, 8],
        "the last row": [0, 3, 7, 10, 13],
        "the last column": [4, 5, 9],
        "one": [6],
    },
    "rows > cols": {
        "no last lines": [0, 1, 4, 7, 9, 16],
        "the last row": [3, 4, 10, 18],
        "the last column": [2, 5, 14],
    },
}


@dataclass(frozen=True)
class Exported:
    """A model and its bundle that drops nothing."""

    tiny: Tiny
    bundle: Path
    backend: OnnxRuntimeBackend


@pytest.fixture(
    scope="module",
    params=[pytest.param("qwen2_vl", marks=pytest.mark.full), "qwen2_5_vl", "qwen3_vl"],
)
def exported(
    request: pytest.FixtureRequest,
    tiny_of: Callable[[str], Tiny],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Exported]:
    tiny = tiny_of(request.param)
    out = tmp_path_factory.mktemp("qwen") / "bundle"
    said: list[str] = []
    gap_export.export(tiny.folder, PruningRequest(keep_ratio=1.0), out=out, warn=said.append)
    # What a license forbids is said before anything is exported.
    assert said == ([LICENSE_NOTE] if tiny.family == "qwen2_5_vl" else [])
    with OnnxRuntimeBackend(open_bundle(out)) as backend:
        yield Exported(tiny, out, backend)


def pixels_of(canvas: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, *CANVASES[canvas], generator=generator)


def row_of(exported: Exported, canvas: str, expression: str = "the star") -> PromptRow:
    """A prompt with all of its visual tokens, in transformers' own features."""
    main, taps = tower_outputs(exported.tiny, pixels_of(canvas))
    features = torch.cat([main, *taps], dim=2)[0].numpy()
    prefix, suffix = stand_in_prompt(exported.tiny.folder, expression)
    words = embed_tokens(exported.backend, np.array([[*prefix, *suffix]]))[0]
    height, width = CANVASES[canvas]
    return PromptRow(
        prefix_embeds=words[: len(prefix)],
        suffix_embeds=words[len(prefix) :],
        image_features=features,
        keep_indices=np.arange(len(features)),
        num_visual_tokens=len(features),
        grid=(height // TOKEN, width // TOKEN),
    )


def pruned(row: PromptRow, keep: list[int]) -> PromptRow:
    return replace(row, image_features=row.image_features[keep], keep_indices=np.array(keep))


def logits_of(exported: Exported, rows: list[PromptRow], positions: Any = "gap") -> np.ndarray:
    """[B, steps, V] of the bundle's decoder, the same tokens forced."""
    prompt = assemble_prompt(rows, positions=positions, position_axes=3)
    forced = np.repeat(STEPS, len(rows), axis=0)
    found = generate(
        exported.backend, prompt, max_new_tokens=1, eos_token_ids=(258,), forced_tokens=forced,
        keep_logits=True,
    )  # fmt: skip
    assert found.logits is not None
    return found.logits


def truth_of(
    exported: Exported, canvas: str, keep: list[int], expression: str = "the star"
) -> np.ndarray:
    """[steps, V] of transformers' model, fed every token, with the dropped ones hidden."""
    model, pixels = exported.tiny.model, pixels_of(canvas)
    prefix, suffix = stand_in_prompt(exported.tiny.folder, expression)
    height, width = CANVASES[canvas]
    number = (height // TOKEN) * (width // TOKEN)
    tokens = torch.tensor([[*prefix, *[IMAGE] * number, *suffix]])
    types = torch.tensor([[0] * len(prefix) + [1] * number + [0] * len(suffix)])
    grid = torch.tensor([[1, height // PATCH, width // PATCH]])
    ids, _ = model.model.get_rope_index(tokens, mm_token_type_ids=types, image_grid_thw=grid)
    mask = torch.ones_like(tokens)
    mask[0, [len(prefix) + place for place in set(range(number)) - set(keep)]] = 0
    past = transformers.DynamicCache()
    found = []
    with torch.inference_mode():
        out = model(
            input_ids=tokens, pixel_values=patches_of(pixels[0]), image_grid_thw=grid,
            mm_token_type_ids=types, attention_mask=mask, position_ids=ids, past_key_values=past,
        )  # fmt: skip
        found.append(out.logits[0, -1])
        for step, token in enumerate(STEPS[0, :-1].tolist()):
            mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], dim=1)
            place = (ids.max() + 1 + step).expand(3, 1, 1)
            out = model(
                input_ids=torch.tensor([[token]]), attention_mask=mask, position_ids=place,
                past_key_values=past,
            )  # fmt: skip
            found.append(out.logits[0, -1])
    return torch.stack(found).numpy()


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


CASES = [(canvas, name) for canvas, kept in KEPT.items() for name in kept]


@pytest.mark.parametrize(("canvas", "name"), CASES)
def test_pruned_equals_unpruned_with_dropped_tokens_hidden(exported, canvas, name):
    keep = KEPT[canvas][name]
    truth = truth_of(exported, canvas, keep)
    row = pruned(row_of(exported, canvas), keep)
    assert truth.std() > 0.5
    assert off(logits_of(exported, [row])[0], truth) <= ATOL
    assert off(logits_of(exported, [row], "compact")[0], truth) > OFF
    shifted = off(logits_of(exported, [row], "text-shifted")[0], truth)
    rows, cols = row.grid
    last_row, last_col = max(keep) // cols, max(place % cols for place in keep)
    longest = max(last_row, last_col) == max(rows, cols) - 1
    # Where the longest axis' last line is left, text goes on where it should.
    assert shifted <= ATOL if longest else shifted > OFF


def test_nothing_pruned_is_transformers_own_and_compact_is_not(exported):
    canvas = "rows < cols"
    row = row_of(exported, canvas)
    truth = truth_of(exported, canvas, row.keep_indices.tolist())
    assert off(logits_of(exported, [row])[0], truth) <= ATOL
    assert off(logits_of(exported, [row], "compact")[0], truth) > OFF


def test_rows_of_a_padded_batch_are_each_their_own_truth(exported):
    asked = [
        ("rows < cols", KEPT["rows < cols"]["no last lines"], "the star"),
        ("rows > cols", KEPT["rows > cols"]["the last row"], "a much longer text"),
        ("rows < cols", [14], "it"),
    ]
    rows = [pruned(row_of(exported, canvas, text), keep) for canvas, keep, text in asked]
    assert len({len(row.suffix_embeds) + len(row.keep_indices) for row in rows}) == 3
    batch = logits_of(exported, rows)
    for ours, (canvas, keep, text) in zip(batch, asked, strict=True):
        assert off(ours, truth_of(exported, canvas, keep, text)) <= ATOL


def test_taps_left_out_or_of_other_tokens_are_far_off(exported):
    if exported.tiny.family != "qwen3_vl":
        pytest.skip("the family has no taps")
    canvas = "rows < cols"
    keep = KEPT[canvas]["no last lines"]
    whole = row_of(exported, canvas)
    truth = truth_of(exported, canvas, keep)
    row = pruned(whole, keep)
    none, others = row.image_features.copy(), row.image_features.copy()
    none[:, HIDDEN:] = 0
    others[:, HIDDEN:] = whole.image_features[: len(keep), HIDDEN:]
    exchanged = np.roll(row.image_features, HIDDEN, axis=1)
    for features in (none, others, exchanged):
        wrong = replace(row, image_features=features)
        assert off(logits_of(exported, [wrong])[0], truth) > OFF


def ask_both(exported: Exported, seed: int, session: GroundingSession) -> tuple[Any, Any]:
    """One question to the bundle, and to transformers' model; token ids of both."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(20, 90)), int(rng.integers(20, 90)))
    image = Image.effect_noise(size, 90).convert("RGB")
    expression = f"thing {seed}"
    ours = session.ground(image, expression)
    pixels, _ = prepare_image(image, session.manifest.image)
    prefix, suffix = stand_in_prompt(exported.tiny.folder, expression)
    number = session.manifest.grid.num_visual_tokens
    tokens = torch.tensor([[*prefix, *[IMAGE] * number, *suffix]])
    exported.tiny.model.model.rope_deltas = None
    grid = session.manifest.grid
    with torch.inference_mode():
        theirs = exported.tiny.model.generate(
            input_ids=tokens,
            mm_token_type_ids=(tokens == IMAGE).long(),
            attention_mask=torch.ones_like(tokens),
            pixel_values=patches_of(torch.from_numpy(pixels[0])),
            image_grid_thw=torch.tensor([[1, grid.rows * MERGE, grid.cols * MERGE]]),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=[258, 256],
            pad_token_id=256,
        )
    return ours.token_ids, tuple(theirs[0, tokens.shape[1] :].tolist())


@pytest.mark.parametrize("number", [3, pytest.param(200, marks=pytest.mark.full)])
def test_answers_of_a_bundle_that_drops_nothing_are_those_of_transformers(exported, number):
    with GroundingSession.open(exported.bundle) as session:
        for seed in range(number):
            ours, theirs = ask_both(exported, seed, session)
            assert ours == theirs, seed


def test_a_bundle_says_what_its_decoder_is_made_of(exported):
    decoder = open_bundle(exported.bundle).manifest.decoder
    third = exported.tiny.family == "qwen3_vl"
    assert decoder.position_axes == 3
    assert (decoder.num_taps, decoder.embeds_size) == ((2, 3 * HIDDEN) if third else (0, HIDDEN))
