"""Stage 2: projector and decoder, on the frozen vision tower.

The questions of one image are packed after one copy of its visual tokens. Three auxiliary losses
make a decoder this small learn on a CPU; their heads are thrown away afterwards: place probes on
visual states, pointers from the prompt's last token at the target's tokens, and alignment of
projected tokens with the decoder's own word embeddings. Two more shape attention: off empty
background, and over the whole of the target.

Nothing here prunes: without `token_dropout` the decoder sees all visual tokens of every image, so
what it does with fewer of them is a property it was not trained for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gap_export.evaluation.refshapes import COLORS, SHAPES, SIZES
from refshapes_training.batching import (
    QUESTIONS_PER_IMAGE,
    LanguageBatch,
    collate_language,
    iter_batches,
    packed_mask,
)
from refshapes_training.loop import (
    Averages,
    Checkpointer,
    Clock,
    OptimizerName,
    build_optimizers,
    take_step,
)
from refshapes_training.model import POINTER_LAYERS, LanguageHeads, RefShapesModel
from refshapes_training.vocabulary import NUM_BINS, Vocabulary

BATCH_SIZE = 32
# Images of a batch whose attention is looked at: a share of them costs less and says as much.
_WATCHED_IMAGES = 8
# Layers that read the answer off the target.
_READING_LAYERS = (2, 3)
# From when on the decoder, which finds the target by then, is made to read all of it.
_SECOND_HALF = 0.5
HOLD, FLOOR, CLIP = 0.2, 0.02, 1.0
REPORT_EVERY = 25
MONITOR_EVERY_SECONDS = 600.0
DATA_SEED_OFFSET = 1_000
ANSWER_SIGMA = 1.0
_PROBE_LAYER = 1
_DROPOUT_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class LanguageStage:
    """Settings of stage 2.

    Attributes:
        minutes: Budget of training time.
        seed: Seed of the data.
        optimizer: Which optimiser trains the hidden matrices.
        learning_rate: Peak.
        token_dropout: Largest share of visual tokens hidden from the decoder; 0 for none.
        background_weight: Weight of the loss against attention parked on empty background.
        spread_weight: Weight, in the second half, of the loss that spreads attention over the
            whole target.
        attention_dropout: In the second half, the usual dropout of single attention weights, drawn
            for each head and query. No token is ever taken away.
        checkpoint: File to resume from and to save to.
    """

    minutes: float
    seed: int
    optimizer: OptimizerName
    learning_rate: float
    token_dropout: float
    background_weight: float
    spread_weight: float
    attention_dropout: float
    checkpoint: Path


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of place probes, attention on background, and attention spread over the target."""

    probe: float
    background: float
    spread: float


def train_language(
    model: RefShapesModel,
    heads: LanguageHeads,
    stage: LanguageStage,
    device: torch.device,
    monitor: Callable[[RefShapesModel], object] | None,
) -> None:
    """Train until the budget is used; resumes by itself.

    Args:
        model: Model on `device` whose vision and text towers are trained already.
        heads: Training-only heads on `device`.
        stage: Settings.
        device: Where to compute.
        monitor: Called with the model now and then, if given; its time is not counted.
    """
    for tower in (model.vision_tower, model.text, model.visual_projection):
        tower.requires_grad_(False)
    trained = [model.projector, model.decoder, model.lm_head, heads]
    optimizers = build_optimizers(
        trained, stage.optimizer, hidden=[model.decoder.layers, model.projector]
    )
    clock = Clock(minutes=stage.minutes)
    saver = Checkpointer(
        path=stage.checkpoint,
        modules={"model": model, "language_heads": heads},
        optimizers=optimizers,
        clock=clock,
        facts={
            "seed": stage.seed,
            "optimizer": stage.optimizer,
            "peak_learning_rate": stage.learning_rate,
            "images_per_step": BATCH_SIZE,
            "token_dropout": stage.token_dropout,
            "background_weight": stage.background_weight,
            "spread_weight": stage.spread_weight,
            "attention_dropout": stage.attention_dropout,
            "questions_per_image": QUESTIONS_PER_IMAGE,
            "threads": torch.get_num_threads(),
        },
    )
    saver.resume()
    averages = Averages()
    batches = iter_batches(
        partial(collate_language, model.design),
        seed=stage.seed + DATA_SEED_OFFSET,
        size=BATCH_SIZE,
        first=clock.step,
    )
    next_look = clock.elapsed + MONITOR_EVERY_SECONDS
    clock.skip()
    while clock.progress < 1:
        batch = next(batches).to(device)
        rate = clock.learning_rate(stage.learning_rate, hold=HOLD, floor=FLOOR)
        weights = LossWeights(
            probe=0.5 if clock.progress < 0.5 else 0.2,
            background=stage.background_weight,
            spread=stage.spread_weight if clock.progress >= _SECOND_HALF else 0.0,
        )
        for layer in model.decoder.layers:
            second_half = clock.progress >= _SECOND_HALF
            layer.self_attn.attention_dropout = stage.attention_dropout if second_half else 0.0
        loss, figures = language_loss(model, heads, batch, weights, stage.token_dropout)
        figures["grad"] = take_step(loss, optimizers, rate, CLIP)
        averages.add(**figures)
        clock.step += 1
        clock.tick()
        if clock.step % REPORT_EVERY == 0:
            averages.report("language", clock, rate)
        saver.save_if_due()
        if monitor is not None and clock.elapsed > next_look:
            next_look += MONITOR_EVERY_SECONDS
            monitor(model)
            clock.skip()
    saver.save(finished=True)


def language_loss(
    model: RefShapesModel,
    heads: LanguageHeads,
    batch: LanguageBatch,
    weights: LossWeights,
    token_dropout: float,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Loss of one batch and the figures to log.

    Args:
        model: The model.
        heads: Training-only heads.
        batch: B images with Q questions.
        token_dropout: See `LanguageStage`.
        weights: The weights of losses that change during training.

    Returns:
        A scalar, and figures by name.
    """
    device, design, tower = batch.images.device, model.design, model.vision_tower
    visual_span = slice(design.visual_start, design.visual_end)
    mask = packed_mask(batch.segments, design.prefix_length)
    hidden_tokens = None
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            shown = tower(batch.images, roll=True, num_layers=tower.num_layers_read)
            selected = tower.tokens(tower.selected(shown))
            taps = [tower.tokens(tap) for tap in tower.tapped(shown)]
        if token_dropout > 0:
            hidden_tokens = _draw_hidden_tokens(selected, token_dropout)
            mask = _hide(mask, hidden_tokens, visual_span)
        visual, *added = (plane.float() for plane in model.project(selected, taps))
        embeds, position_ids = embed(model, batch, visual)
        states, layers = model.decode(embeds, position_ids, mask, added)
        watched = slice(0, _WATCHED_IMAGES)
        inputs = [state[watched] for state in (embeds, *layers[:-1])]
        attention = model.attention(inputs, position_ids[:, watched], mask[watched])
        asking = design.prefix_length + batch.asking
        places = torch.arange(batch.answers.shape[1], device=device)
        logits = model.lm_head(states[batch.rows[:, None], asking[:, None] + places])
        probes = heads.places(layers[_PROBE_LAYER][:, visual_span])
        pointers = [
            heads.pointer_logits(
                which,
                layers[layer][batch.rows, asking],
                layers[layer][:, visual_span],
                batch.rows,
            )
            for which, layer in enumerate(POINTER_LAYERS)
        ]
    usable = batch.target_patches.any(1)
    if hidden_tokens is not None:
        seen = batch.target_patches & ~hidden_tokens[batch.rows]
        usable = seen.sum(1) >= 0.2 * batch.target_patches.sum(1).clamp(min=1)
        pointers = [p.masked_fill(hidden_tokens[batch.rows], -30.0) for p in pointers]

    answer = answer_loss(model.vocabulary, logits[usable], batch.answers[usable])
    pointer = torch.stack([_pointer_loss(p, batch.target_patches, usable) for p in pointers]).sum()
    alignment = _alignment_loss(model, heads, batch, visual)
    probe = _probe_loss(model, probes, batch)
    loss = answer + 0.5 * pointer + 0.5 * alignment + weights.probe * probe
    background = _background_loss(model, attention, batch)
    spread = _spread_loss(model, attention, batch)
    loss = loss + weights.background * background + weights.spread * spread
    with torch.no_grad():
        said, wanted = (_boxes(model.vocabulary, t) for t in (logits.argmax(-1), batch.answers))
        overlap = box_overlap(said, wanted)
        pointed = batch.target_patches.gather(1, pointers[-1].argmax(1, keepdim=True))
        figures: dict[str, float | Tensor] = {
            "loss": loss.detach(),
            "answer": answer.detach(),
            "forced_acc": (overlap >= 0.5).float().mean(),
            "forced_iou": overlap.mean(),
            "pointer": pointer.detach(),
            "pointed": pointed.float().mean(),
            "align": alignment.detach(),
            "probe": probe.detach(),
            "background": background.detach(),
            "spread": spread.detach(),
        }
    return loss, figures


def answer_loss(vocabulary: Vocabulary, logits: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy; against a Gaussian over neighbouring values for leading digits.

    Args:
        vocabulary: Says what each token of an answer can be.
        logits: [Q, A, V].
        answers: int64 [Q, A].

    Returns:
        Mean over all tokens.
    """
    log_probs = logits.float().log_softmax(-1)
    bins = torch.arange(NUM_BINS, device=logits.device)
    kernel = torch.exp(-0.5 * ((bins[:, None] - bins) / ANSWER_SIGMA) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    smoothed = [slot.is_first for slot in vocabulary.design.answer]
    losses = []
    for place, (smooth, offset) in enumerate(
        zip((*smoothed, False), vocabulary.offsets, strict=True)
    ):
        if smooth:
            wanted = kernel[answers[:, place] - offset]
            among = log_probs[:, place, offset : offset + NUM_BINS]
            losses.append(-(wanted * among).sum(-1))
        else:
            chosen = answers[:, place, None]
            losses.append(-log_probs[:, place].gather(1, chosen)[:, 0])
    return torch.stack(losses).mean()


def box_overlap(candidate: Tensor, reference: Tensor) -> Tensor:
    """Intersection over union of boxes (x1, y1, x2, y2); [..., 4] twice -> [...]."""
    low = torch.maximum(candidate[..., :2], reference[..., :2])
    high = torch.minimum(candidate[..., 2:], reference[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (candidate, reference)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)


def embed(model: RefShapesModel, batch: LanguageBatch, visual: Tensor) -> tuple[Tensor, Tensor]:
    """Input embeddings [B, S, H], ids [A, B, S]; every question starts behind the prefix."""
    size, device = batch.images.shape[0], batch.images.device
    table = model.decoder.embed_tokens
    before, behind = (
        table(torch.tensor(ids, device=device, dtype=torch.int64)).expand(size, -1, -1)
        for ids in (model.vocabulary.before, model.vocabulary.behind)
    )
    embeds = torch.cat([before, visual, behind, table(batch.ids)], 1)
    ids = torch.from_numpy(model.design.prefix_ids()).to(device)
    shared = ids[:, None, :-1].expand(-1, size, -1)
    asked = ids[:, None, -1:] + batch.offsets
    return embeds, torch.cat([shared, asked], 2)


def _background_loss(
    model: RefShapesModel, attention: list[Tensor], batch: LanguageBatch
) -> Tensor:
    """Attention of words and object patches that falls on empty background, -log(1 - share).

    A head with nothing to say must look somewhere. An LLM that was pre-trained on text looks at
    its first token then (arXiv 2309.17453); this decoder has seen no text without an image, and
    would park on background, which is always there in training and not always after pruning.
    """
    images, _, length, _ = attention[0].shape
    start, end = model.design.visual_start, model.design.visual_end
    background = torch.zeros(images, length, dtype=torch.bool, device=attention[0].device)
    background[:, start:end] = ~batch.covered[:images]
    asking = ~background
    asking[:, :start] = False
    asking[:, model.design.prefix_length :] = batch.segments[:images] >= 0
    shares = torch.stack([(w * background[:, None, None]).sum(-1) for w in attention])
    loss = -torch.log1p(-shares.clamp(max=0.999))
    return loss.mean((0, 2))[asking].mean()


def _spread_loss(model: RefShapesModel, attention: list[Tensor], batch: LanguageBatch) -> Tensor:
    """Cross-entropy between what a coordinate's query reads and all patches of the target alike.

    Every patch of an object knows the whole box. Left alone, a query reads x1 off the left-most
    patches only, and guesses too small a box where those are gone.
    """
    watched = (batch.rows < attention[0].shape[0]) & batch.target_patches.any(1)
    rows, asking = batch.rows[watched], batch.asking[watched]
    design = model.design
    leading = [place for place, slot in enumerate(design.answer) if slot.is_first]
    places = torch.tensor(leading, device=rows.device)
    columns = design.prefix_length + asking[:, None] + places
    wanted = batch.target_patches[watched].float()
    wanted = wanted / wanted.sum(1, keepdim=True)
    total = wanted.new_zeros(())
    for layer in _READING_LAYERS:
        read = attention[layer].mean(1)[rows[:, None], columns]
        seen = read[..., design.visual_start : design.visual_end].clamp(min=1e-6)
        total = total - (wanted[:, None] * seen.log()).sum(-1).mean()
    return total / len(_READING_LAYERS)


def _pointer_loss(logits: Tensor, targets: Tensor, usable: Tensor) -> Tensor:
    """Cross-entropy between a pointer [Q, N] and the target's patches, all equally good."""
    wanted = targets.float() / targets.sum(1, keepdim=True).clamp(min=1)
    return -(wanted * logits.log_softmax(-1)).sum(1)[usable].mean()


def _probe_loss(
    model: RefShapesModel, probes: tuple[Tensor, Tensor, Tensor], batch: LanguageBatch
) -> Tensor:
    """Can row, column and the object's box be read from the visual states?"""
    rows, columns, boxes = probes
    places = torch.from_numpy(model.design.tokens.rows_and_columns()).to(rows.device)
    row, column = places.repeat(1, rows.shape[0])
    return (
        functional.cross_entropy(rows.flatten(0, 1), row)
        + functional.cross_entropy(columns.flatten(0, 1), column)
        + 5 * (boxes - batch.boxes)[batch.covered].abs().mean()
    )


def _alignment_loss(
    model: RefShapesModel, heads: LanguageHeads, batch: LanguageBatch, visual: Tensor
) -> Tensor:
    """Projected patches should resemble the embeddings of the words for what they show."""
    shown = functional.normalize(visual[batch.covered], dim=-1) * heads.alignment_scale.exp()
    table = model.decoder.embed_tokens.weight
    total = shown.new_zeros(())
    for words, labels in (
        (COLORS, batch.color),
        (SHAPES, batch.shape),
        (SIZES, batch.small),
    ):
        ids = torch.tensor([model.vocabulary.ids[w] for w in words], device=shown.device)
        logits = shown @ functional.normalize(table[ids], dim=-1).T
        total = total + functional.cross_entropy(logits, labels[batch.covered])
    return total


def _draw_hidden_tokens(selected: Tensor, largest_share: float) -> Tensor:
    """Tokens to hide, at random or along a random feature direction; bool [B, N].

    The second way is correlated with content, as a pruner's choice is.
    """
    size, device = selected.shape[0], selected.device
    direction = torch.randn(size, selected.shape[-1], 1, device=device)
    by_content = (selected.float() @ direction)[..., 0]
    by_chance = torch.rand_like(by_content)
    score = torch.where(torch.rand(size, 1, device=device) < 0.4, by_content, by_chance)
    rank = score.argsort(1).argsort(1) / score.shape[1]
    share = torch.rand(size, 1, device=device) * largest_share
    return (rank < share) & (torch.rand(size, 1, device=device) < _DROPOUT_SHARE)


def _hide(mask: Tensor, hidden_tokens: Tensor, visual_span: slice) -> Tensor:
    """Block the hidden tokens as keys, except for themselves; ids stay what they were."""
    keys = torch.zeros(mask.shape[0], mask.shape[-1], dtype=torch.bool, device=mask.device)
    keys[:, visual_span] = hidden_tokens
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask & (~keys[:, None, None, :] | itself)


def _boxes(vocabulary: Vocabulary, tokens: Tensor) -> Tensor:
    """Answer ids [Q, A] to boxes [Q, 4] as fractions; a token of the wrong kind lies outside."""
    boxes = tokens.new_zeros((len(tokens), 4), dtype=torch.float32)
    for place, slot in enumerate(vocabulary.design.answer):
        if slot.corner is not None:
            boxes[:, slot.corner] += slot.unit * (tokens[:, place] - vocabulary.offsets[place])
    return boxes
