"""A decoder whose RoPE reads three ids a token (M-RoPE), from the prompt to the last token.

The tiny LLaVA is given such a decoder. It is exported, checked and run as any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import MAIN, Checkpoint
from gap_export.evaluation.evaluate import evaluate_bundle
from gap_export.exporting import ExportOptions, export_model
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.families import build_reference
from gap_export.families.common.checkpoints import configs
from gap_export.parity import check as check_module
from gap_export.parity.inside.look import Inside
from gap_export.parity.inside.positions_seen import read_positions
from gap_export.parity.question import Question
from gap_export.report.evaluation import document_of_evaluation
from gap_export.report.markdown import to_markdown
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.backends.tensorrt_backend import TensorRTBackend
from gap_export.runtime.backends.tensorrt_loading import choose_engines
from gap_export.runtime.generation import PromptRow, assemble_prompt, embed_tokens, generate
from gap_export.runtime.session import GroundingSession
from gap_export.spec.architecture import DecoderShape
from gap_export.spec.manifest import EngineLimits
from gap_export.spec.positions import compact_positions
from gap_export.spec.requests import PruningRequest
from tests.parity.checking import check_with_torch, statuses
from tests.runtime.backends.fake_gpu import FakeDevice
from tests.runtime.backends.fake_tensorrt import (
    FakeModule,
    copy_bundle,
    fake_library,
    write_engines,
)
from tests.shared import SharedFolder

ATOL = 1e-4
STEPS = np.array([[7, 20, 11, 30, 9]])
# Rows and columns, and kept tokens; none in the last row, nor in the last two columns.
GRIDS = {
    "rows < cols": ((3, 6), [0, 2, 7, 9]),
    "rows > cols": ((6, 3), [0, 3, 7, 9, 12]),
    "all rows": ((6, 3), [0, 3, 7, 9, 15]),
}


@pytest.fixture(scope="module")
def mrope() -> Iterator[None]:
    """Decoders have three position axes: of four frequencies time, row, column, column turn one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "DecoderShape", partial(DecoderShape, rope_sections=(1, 1, 2)))
        yield


@pytest.fixture(scope="module")
def bundle(mrope: None, tiny_checkpoint: Path, shared: SharedFolder) -> Path:
    request = PruningRequest(pruner="spatial", keep_ratio=0.3)
    options = ExportOptions(model=str(tiny_checkpoint), pruning=request)
    return shared.once("mrope", lambda out: export_model(dataclasses.replace(options, out=out)))


@pytest.fixture(scope="module")
def backend(bundle: Path) -> Iterator[OnnxRuntimeBackend]:
    with OnnxRuntimeBackend(open_bundle(bundle)) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(bundle: Path, tiny_graphs: Any) -> Any:
    """The PyTorch model."""
    parts = Checkpoint.of(tiny_graphs.checkpoint)
    return build_reference(tiny_graphs.recipe, parts, tiny_graphs.pruning(), device="cpu")


def prompt_row(
    backend: Any, grid: tuple[int, int], keep: list[int], *, before: int = 4, after: int = 5
) -> tuple[PromptRow, np.ndarray]:
    """A row of random words and visual tokens, and the visual tokens of which some are kept."""
    rng = np.random.default_rng(7)
    text = embed_tokens(backend, rng.integers(5, 60, size=(1, before + after)))[0]
    every = rng.normal(size=(grid[0] * grid[1], text.shape[1])).astype(np.float32)
    row = PromptRow(
        prefix_embeds=text[:before],
        suffix_embeds=text[before:],
        image_features=every[keep],
        keep_indices=np.array(keep),
        num_visual_tokens=len(every),
        grid=grid,
    )
    return row, every


def logits_of(
    backend: Any, rows: list[PromptRow], positions: Any = "gap", *, num_shared: int = 0
) -> np.ndarray:
    """[B, steps, V], the same tokens forced; the first ``num_shared`` go in once for all rows."""
    prompt = assemble_prompt(rows, positions=positions, position_axes=3, num_shared=num_shared)
    prefix = None
    if num_shared:
        prefix = backend.new_cache(1, num_shared)
        backend.decode(prompt.shared_feed, prefix)
    answer = generate(
        backend,
        prompt,
        max_new_tokens=1,
        eos_token_ids=(2,),
        forced_tokens=np.repeat(STEPS, len(rows), axis=0),
        keep_logits=True,
        prefix=prefix,
    )
    assert answer.logits is not None
    return answer.logits


def masked_logits(reference: Any, row: PromptRow, every: np.ndarray) -> np.ndarray:
    """[1, steps, V] of the plain decoder, all tokens fed, dropped ones hidden; ids by a loop."""
    rows, cols = row.grid or (0, 0)
    start = len(row.prefix_embeds)
    ids = [[place] * 3 for place in range(start)]
    ids += [[start, start + r, start + c] for r in range(rows) for c in range(cols)]
    more = len(row.suffix_embeds) + STEPS.size
    ids += [[start + max(rows, cols) + place] * 3 for place in range(more)]
    full = np.concatenate([row.prefix_embeds, every, row.suffix_embeds])
    with torch.inference_mode():
        fed = reference.embed_tokens(torch.from_numpy(STEPS[0, :-1])).numpy()
    dropped = set(range(len(every))) - set(row.keep_indices.tolist())
    found = []
    for step in range(STEPS.size):
        embeds = np.concatenate([full, fed[:step]])
        mask = np.ones((1, len(embeds)), dtype=np.int64)
        mask[0, [start + index for index in dropped]] = 0
        table = np.array(ids[: len(embeds)]).T[:, None]
        spec = reference.decoder_spec
        past = torch.zeros(1, spec.num_key_value_heads, 0, spec.head_dim)
        with torch.inference_mode():
            logits, *_ = reference.decoder(
                *(torch.from_numpy(array) for array in (embeds[None], mask, table)),
                *[past] * (2 * spec.num_layers),
            )
        found.append(logits[:, 0].numpy())
    return np.stack(found, axis=1)


@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize(("grid", "keep"), GRIDS.values(), ids=GRIDS)
def test_pruned_equals_unpruned_with_dropped_tokens_hidden(
    backend, reference, grid, keep, before, after
):
    row, every = prompt_row(backend, grid, keep, before=before, after=after)
    truth = masked_logits(reference, row, every)
    assert np.abs(truth).max() > 0.5
    assert np.abs(logits_of(backend, [row]) - truth).max() <= ATOL
    assert np.abs(logits_of(TorchBackend(reference), [row]) - truth).max() <= ATOL
    shared = before + len(keep)
    for one in (backend, TorchBackend(reference)):
        assert np.abs(logits_of(one, [row], num_shared=shared) - truth).max() <= ATOL
    assert np.abs(logits_of(backend, [row], "compact") - truth).max() > 0.1
    shifted = np.abs(logits_of(backend, [row], "text-shifted") - truth).max()
    # Where a token of the longest axis' last line is left, text goes on where it should.
    keeps_last_line = max(keep) // grid[1] == grid[0] - 1
    assert shifted <= ATOL if keeps_last_line else shifted > 0.05


def test_all_kept_equals_unpruned_ids_bit_for_bit_and_compact_does_not(backend):
    row, _ = prompt_row(backend, (3, 6), list(range(18)))
    prompt = assemble_prompt([row], positions="gap", position_axes=3)
    # The unpruned ids for every slot: nothing is left to the rule beyond the table.
    whole = dataclasses.replace(
        prompt, id_table=np.concatenate([prompt.id_table, 15 + np.zeros((3, 1, 5), int)], axis=-1)
    )
    whole.id_table[..., -5:] += np.arange(5)
    runs = [
        generate(
            backend, given, max_new_tokens=1, eos_token_ids=(2,), forced_tokens=STEPS,
            keep_logits=True,
        ).logits
        for given in (prompt, whole)
    ]  # fmt: skip
    assert prompt.id_table[0, 0, -1] == 14
    assert np.array_equal(*runs)
    # The plane is lost though nothing is dropped: other than with one axis.
    assert np.abs(logits_of(backend, [row], "compact") - runs[0]).max() > 0.1


def test_rows_of_a_padded_batch_equal_the_rows_alone(backend):
    rows = [
        prompt_row(backend, (3, 6), [0, 2, 7, 9])[0],
        prompt_row(backend, (6, 3), list(range(18)), before=2, after=9)[0],
        prompt_row(backend, (1, 1), [0], before=0, after=1)[0],
    ]
    batch = logits_of(backend, rows)
    for index, row in enumerate(rows):
        assert np.abs(batch[index] - logits_of(backend, [row])[0]).max() <= ATOL


def test_rows_that_share_their_image_equal_the_rows_alone(backend):
    longer, _ = prompt_row(backend, (3, 6), [0, 2, 7, 9], after=9)
    rows = [longer, dataclasses.replace(longer, suffix_embeds=longer.suffix_embeds[3:5])]
    for positions in ("gap", "compact", "text-shifted"):
        batch = logits_of(backend, rows, positions, num_shared=8)
        for index, row in enumerate(rows):
            assert np.abs(batch[index] - logits_of(backend, [row], positions)[0]).max() <= ATOL


def test_a_session_feeds_slots_and_three_axes(bundle):
    manifest = open_bundle(bundle).manifest
    assert manifest.decoder.position_axes == 3
    shapes = {tensor.name: tensor.shape for tensor in manifest.graph("decoder_model_merged").inputs}
    assert shapes["position_ids"] == ("batch_size", "sequence_length")
    assert shapes["kept_positions"] == (3, "batch_size", "prompt_length")
    image = Image.effect_noise((48, 32), 90).convert("RGB")
    with GroundingSession.open(bundle) as session:
        alone = [session.ground(image, words) for words in ("the star", "a big red square")]
        both = session.ground_batch(image, ["the star", "a big red square"])
    assert [one.token_ids for one in both] == [one.token_ids for one in alone]


@pytest.mark.parametrize("contract", ["concat", "in_place"])
def test_engines_are_fed_a_table_of_one_length_on_every_axis(bundle, tmp_path, contract):
    """Of TensorRT but its interface: a GPU made of host memory."""
    copied = copy_bundle(bundle, tmp_path / "bundle", in_place=contract == "in_place")
    limits = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=2, max_images=1)
    write_engines(copied, limits)
    device = FakeDevice()
    module = FakeModule(device)
    chosen = choose_engines(
        copied,
        open_device=lambda: device,
        import_library=lambda name: fake_library(module, name),
    )
    image, words = Image.effect_noise((48, 32), 90).convert("RGB"), ["the star", "a big red square"]
    runs = TensorRTBackend(copied, chosen)
    with GroundingSession(copied.manifest, copied.path, runs) as session:
        given = session.ground_batch(image, words)
        shapes = [
            c.shapes["kept_positions"] for c in module.contexts if "kept_positions" in c.shapes
        ]
    with GroundingSession.open(bundle) as session:
        wanted = session.ground_batch(image, words)
    assert [one.token_ids for one in given] == [one.token_ids for one in wanted]
    assert shapes[-1] == (3, 2, limits.max_prompt) and len(shapes) == 2


def test_context_counts_ids_and_not_tokens(bundle):
    opened = open_bundle(bundle)
    # 16 visual tokens take up 4 ids: <s> USER: + 4 + 2 words + ASSISTANT: = 9, 8 for the answer.
    decoder = dataclasses.replace(opened.manifest.decoder, max_position_embeddings=21)
    manifest = dataclasses.replace(opened.manifest, decoder=decoder)
    with GroundingSession(manifest, bundle, OnnxRuntimeBackend(opened)) as session:
        session.ground(Image.new("RGB", (32, 32)), "the star")


def check(bundle: Path, graphs: Any) -> Any:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    questions = [
        Question(image=image, expression=words) for words in ("the star", "a big red square")
    ]
    parts = Checkpoint.of(graphs.checkpoint)
    return check_with_torch(bundle, graphs.recipe, parts, questions)


def test_check_compares_with_the_same_decoder_and_reads_ids_of_all_axes(bundle, mrope, tiny_graphs):
    report = check(bundle, tiny_graphs)
    failed = [level for level in report.backends[0].levels if level.status == "failed"]
    assert not failed, [(level.level, level.reason) for level in failed]
    rows = read_positions(open_bundle(bundle))
    assert isinstance(rows, tuple) and all(row.passed for row in rows)


def test_a_graph_whose_rows_turn_what_columns_should_fails(bundle, mrope, tiny_graphs, monkeypatch):
    # Where the difference begins is looked for, and tested, elsewhere.
    monkeypatch.setattr(check_module, "look_inside", lambda *_, **__: Inside())
    monkeypatch.setattr(configs, "DecoderShape", partial(DecoderShape, rope_sections=(1, 2, 1)))
    assert statuses(check(bundle, tiny_graphs))["tensor"] == "failed"


def test_eval_asks_text_shifted_and_compact_with_nothing_dropped(bundle, mrope, tiny_checkpoint):
    report = evaluate_bundle(bundle, checkpoint={MAIN: tiny_checkpoint}, num_samples=2)
    arms = [(row.pruner, row.positions) for row in report.rows]
    pruned = [("spatial", positions) for positions in ("compact", "text-shifted", "gap")]
    assert arms == [("none", "none"), ("none", "compact"), *pruned]
    pairs = [(one.first, one.second) for one in report.comparisons]
    gap = "spatial keep 0.3 gap"
    assert pairs == [
        ("unpruned", "unpruned compact"),
        (gap, "spatial keep 0.3 compact"),
        (gap, "spatial keep 0.3 text-shifted"),
        ("unpruned", gap),
    ]
    assert {"unpruned compact", "text-shifted"} <= report.misalignments.keys()
    page = to_markdown(document_of_evaluation(report))
    assert "text-shifted" in page and "compact, no token dropped" in page


def test_compact_table_has_the_slot_on_every_axis(backend):
    row, _ = prompt_row(backend, (3, 6), [0, 2, 7, 9])
    prompt = assemble_prompt([row], positions="compact", position_axes=3)
    assert prompt.id_table.tolist() == [[compact_positions(13).tolist()]] * 3
    assert prompt.kept_positions.tolist() == [[0, 1, 2, 3, 4, 6, 11, 13, 22, 23, 24, 25, 26]]
