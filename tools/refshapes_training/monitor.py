"""Greedy answers on held-out questions: unpruned, and pruned with compact or original ids.

An independent, plain reading of what gap-export does inside a graph, kept here so that training
does not depend on the package it is meant to test.

Shape letters: I images, Q questions, N=144 patches, K kept ones, T text tokens, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from gap_export.evaluation.refshapes import IMAGE_SIZE, Sample, iter_samples
from refshapes_training import vocabulary as vocab
from refshapes_training.language_stage import box_overlap
from refshapes_training.loop import logger
from refshapes_training.model import (
    GRID_SIZE,
    NUM_PATCHES,
    PREFIX_LENGTH,
    SELECT_LAYER,
    RefShapesModel,
)

Positions = Literal["gap", "compact"]
_CHUNK = 250
_PRUNER_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Held-out questions as the decoder takes them, with what the pruners look at.

    Attributes:
        kinds: Kind of each expression.
        rows: int64 [Q], image of each question.
        ids: int64 [Q, T], expression and `ASSISTANT:`, padded on the left.
        padding: bool [Q, T], True where padded.
        boxes: float32 [Q, 4], answers as fractions.
        visual: float32 [I, N, H], projected patches.
        scores: Score of each patch by pruner; [I, N], or [Q, N] where the text has a say.
        target_patches: bool [Q, N].
    """

    kinds: tuple[str, ...]
    rows: Tensor
    ids: Tensor
    padding: Tensor
    boxes: Tensor
    visual: Tensor
    scores: dict[str, Tensor]
    target_patches: Tensor


@torch.no_grad()
def prepare_questions(
    model: RefShapesModel, *, num_samples: int, seed: int, device: torch.device
) -> Questions:
    """Render held-out images, encode them once, and score their patches.

    Args:
        model: Model on `device`.
        num_samples: Number of questions, four at most per image.
        seed: Seed of the held-out set.
        device: Where to compute.

    Returns:
        The questions.
    """
    samples = list(iter_samples(seed=seed, num_samples=num_samples))
    scenes = {sample.scene.index: sample.scene for sample in samples}
    order = {index: row for row, index in enumerate(scenes)}
    rows = torch.tensor([order[s.scene.index] for s in samples], device=device)
    ids, padding = _left_padded(samples)
    images = torch.from_numpy(np.stack([scene.image for scene in scenes.values()]))
    parts = [_encode(model, chunk.to(device)) for chunk in images.split(_CHUNK)]
    visual, cls, attention, patches = (torch.cat(column) for column in zip(*parts, strict=True))
    texts = np.stack([vocab.encode_for_text_tower(s.expression.text) for s in samples])
    embeds = functional.normalize(model.encode_text(torch.from_numpy(texts).to(device)), dim=-1)
    maps = np.stack([s.scene.object_map.reshape(-1) == s.expression.target for s in samples])
    return Questions(
        kinds=tuple(s.expression.kind for s in samples),
        rows=rows,
        ids=ids.to(device),
        padding=padding.to(device),
        boxes=torch.tensor([s.box for s in samples], device=device) / IMAGE_SIZE,
        visual=visual,
        scores={
            "cls": cls[rows],
            "text": torch.einsum("qnd,qd->qn", patches[rows], embeds),
            "fastervlm": attention[rows],
        },
        target_patches=torch.from_numpy(maps).to(device),
    )


def select(questions: Questions, pruner: str, num_kept: int) -> Tensor:
    """Indices that a pruner keeps.

    Args:
        questions: Q questions.
        pruner: One of `PRUNERS`.
        num_kept: K.

    Returns:
        int64 [Q, K], ascending.
    """
    count, device = questions.rows.shape[0], questions.rows.device
    if pruner == "spatial":
        return _spatial(num_kept).to(device).expand(count, -1)
    if pruner == "random":
        generator = torch.Generator().manual_seed(_PRUNER_SEED)
        scores = torch.rand(count, NUM_PATCHES, generator=generator).to(device)
    else:
        scores = questions.scores[pruner]
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :num_kept]
    return best.sort(1).values


PRUNERS: tuple[str, ...] = ("cls", "text", "random", "spatial", "fastervlm")


@torch.no_grad()
def answer(
    model: RefShapesModel, questions: Questions, keep: Tensor, positions: Positions
) -> Tensor:
    """Greedy answers.

    Args:
        model: The model.
        questions: Q questions.
        keep: int64 [Q, K], ascending.
        positions: Whether kept tokens hold their own ids ("gap") or are numbered anew.

    Returns:
        int64 [Q, 4], the first four tokens of each answer.
    """
    chunks = torch.arange(keep.shape[0], device=keep.device).split(_CHUNK)
    return torch.cat([_answer_chunk(model, questions, keep, positions, c) for c in chunks])


def overlaps(questions: Questions, tokens: Tensor) -> Tensor:
    """IoU of each answer; 0 where a token is not of the kind its place calls for. [Q]."""
    bins = tokens - torch.tensor(vocab.PLACE_OFFSETS, device=tokens.device)
    well_formed = ((bins >= 0) & (bins < vocab.NUM_BINS)).all(1)
    return box_overlap(bins / 100, questions.boxes) * well_formed


def evaluate(
    model: RefShapesModel,
    questions: Questions,
    *,
    keep_ratios: Sequence[float],
    cases: Sequence[tuple[str, Positions]],
    report: Callable[[str], None] = logger.info,
) -> dict[str, float]:
    """Acc@0.5 unpruned, and for every keep ratio and case.

    Args:
        model: The model; its mode is left alone (there is no dropout in it).
        questions: What to ask.
        keep_ratios: Shares of visual tokens to keep.
        cases: Pairs of pruner and positions.
        report: Called with a line for every figure.

    Returns:
        Figures in 0..1 by name: "unpruned", "unpruned/<kind>", "<pruner>/<keep>/<positions>" and
        "<pruner>/<keep>/target", the share of the target's patches that is kept.
    """
    count = questions.rows.shape[0]
    everything = torch.arange(NUM_PATCHES, device=questions.rows.device).expand(count, -1)
    overlap = overlaps(questions, answer(model, questions, everything, "gap"))
    figures = {"unpruned": _share(overlap), "unpruned/mean_iou": float(overlap.mean())}
    for kind in sorted(set(questions.kinds)):
        chosen = torch.tensor([k == kind for k in questions.kinds])
        figures[f"unpruned/{kind}"] = _share(overlap[chosen])
    report(f"unpruned n={count} " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    for ratio in keep_ratios:
        num_kept = int(ratio * NUM_PATCHES + 0.5)
        for pruner, positions in cases:
            keep = select(questions, pruner, num_kept)
            kept = torch.zeros_like(questions.target_patches).scatter_(1, keep, True)
            target = (kept & questions.target_patches).sum() / questions.target_patches.sum()
            accuracy = _share(overlaps(questions, answer(model, questions, keep, positions)))
            figures[f"{pruner}/{ratio}/{positions}"] = accuracy
            figures[f"{pruner}/{ratio}/target"] = float(target)
            report(
                f"keep {ratio} {pruner} {positions} acc {accuracy:.3f} "
                f"of_unpruned {accuracy / max(figures['unpruned'], 1e-9):.3f} "
                f"target_kept {float(target):.2f}"
            )
    return figures


def _answer_chunk(
    model: RefShapesModel, questions: Questions, keep: Tensor, positions: Positions, chunk: Tensor
) -> Tensor:
    """`answer` for the questions in `chunk`: prefill once, then one token at a time."""
    keep, device = keep[chunk], keep.device
    count, num_kept = keep.shape
    table = model.decoder.embed_tokens
    visual = questions.visual[questions.rows[chunk][:, None], keep]
    prefix = table(torch.tensor(vocab.PREFIX, device=device)).expand(count, -1, -1)
    embeds = torch.cat([prefix, visual, table(questions.ids[chunk])], 1)

    start = len(vocab.PREFIX)
    visual_ids = keep if positions == "gap" else torch.arange(num_kept, device=device)
    text_start = PREFIX_LENGTH if positions == "gap" else start + num_kept
    padding = questions.padding[chunk]
    text_ids = text_start + (~padding).long().cumsum(1).sub(1).clamp(min=0)
    position_ids = torch.cat(
        [
            torch.arange(start, device=device).expand(count, -1),
            start + visual_ids.expand(count, -1),
            text_ids,
        ],
        1,
    )
    visible = functional.pad(~padding, (start + num_kept, 0), value=True)
    length = visible.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = causal & visible[:, None, None, :]

    cache = DynamicCache()
    tokens: list[Tensor] = []
    while len(tokens) < vocab.NUM_PLACES:
        state = _decode_cached(model, embeds, position_ids, mask, cache)
        tokens.append(model.llava.lm_head(state).argmax(-1))
        embeds = table(tokens[-1])[:, None]
        position_ids = position_ids[:, -1:] + 1
        visible = functional.pad(visible, (0, 1), value=True)
        mask = visible[:, None, None, :]
    return torch.stack(tokens, 1)


def _decode_cached(
    model: RefShapesModel, embeds: Tensor, position_ids: Tensor, mask: Tensor, cache: DynamicCache
) -> Tensor:
    """Run the decoder on top of the cache; the last normalised state [Q, H]."""
    rotary = model.decoder.rotary_emb(embeds, position_ids)
    hidden = embeds
    for layer in model.decoder.layers:
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=position_ids,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=True,
        )
    last: Tensor = model.decoder.norm(hidden[:, -1])
    return last


def _encode(model: RefShapesModel, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projected patches, cosine with [CLS], [CLS] attention, and patches in the joint space."""
    states = model.encode_image(images)
    selected = states[SELECT_LAYER]
    normal = functional.normalize(selected, dim=-1)
    layers = model.vision_tower.encoder.layers
    attention = _cls_attention(layers[len(layers) + SELECT_LAYER], states[SELECT_LAYER - 1])
    return (
        model.projector(selected[:, 1:]),
        (normal[:, 1:] @ normal[:, :1].mT)[..., 0],
        attention,
        model.project_patches(selected[:, 1:]),
    )


def _cls_attention(layer: torch.nn.Module, hidden: Tensor) -> Tensor:
    """Attention of [CLS] to the patches in a vision layer, mean over heads; [I, N]."""
    attention = layer.self_attn
    normal = layer.layer_norm1(hidden)
    query = attention.q_proj(normal[:, :1]).unflatten(-1, (attention.num_heads, -1))
    key = attention.k_proj(normal).unflatten(-1, (attention.num_heads, -1))
    weights = torch.einsum("bqhd,bkhd->bhk", query, key) * attention.scale
    return weights.softmax(-1).mean(1)[:, 1:]


def _spatial(num_kept: int) -> Tensor:
    """An even grid of exactly K patches; int64 [K], ascending.

    round(sqrt(K * rows / columns)) rows spread evenly, K spread evenly over them, and the columns
    of a row spread evenly again.
    """
    num_rows = min(max(round((num_kept * GRID_SIZE / GRID_SIZE) ** 0.5), 1), GRID_SIZE)
    indices: list[int] = []
    for i in range(num_rows):
        row = int((i + 0.5) * GRID_SIZE / num_rows)
        count = (i + 1) * num_kept // num_rows - i * num_kept // num_rows
        columns = [int((j + 0.5) * GRID_SIZE / count) for j in range(count)]
        indices += [row * GRID_SIZE + column for column in columns]
    return torch.tensor(indices)


def _left_padded(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Prompt text after the image, padded on the left, and where; [Q, T] twice."""
    prompts = [[*vocab.encode_words(s.expression.text), vocab.ASSISTANT] for s in samples]
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), vocab.PAD)
    padding = torch.ones(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        padding[row, -len(prompt) :] = False
    return ids, padding


def _share(overlap: Tensor) -> float:
    """Acc@0.5."""
    return float((overlap >= 0.5).float().mean())
