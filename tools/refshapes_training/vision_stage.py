"""Stage 1: the vision tower and the text tower, from scratch and together.

Three losses: CLIP's contrastive one between [CLS] and captions; dense ones that ask each patch
what it shows; and patch-text alignment, so that a pruner may rank patches by a phrase. The last
two read the patches that the decoder will get, which TRIM scores too, not the final layer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from refshapes_training.batching import VisionBatch, collate_vision, iter_batches
from refshapes_training.loop import (
    Averages,
    Checkpointer,
    Clock,
    OptimizerName,
    build_optimizers,
    take_step,
)
from refshapes_training.model import RefShapesModel, VisionHeads

BATCH_SIZE = 64
HOLD, FLOOR, CLIP = 0.3, 0.03, 2.0
REPORT_EVERY = 50
DATA_SEED_OFFSET = 0
_MAX_LOGIT_SCALE = 4.6


@dataclass(frozen=True, kw_only=True)
class VisionStage:
    """Settings of stage 1.

    Attributes:
        minutes: Budget of training time.
        seed: Seed of the data.
        optimizer: Which optimiser trains the hidden matrices.
        learning_rate: Peak.
        checkpoint: File to resume from and to save to.
    """

    minutes: float
    seed: int
    optimizer: OptimizerName
    learning_rate: float
    checkpoint: Path


def train_vision(
    model: RefShapesModel, heads: VisionHeads, stage: VisionStage, device: torch.device
) -> None:
    """Train until the budget is used; resumes by itself.

    Args:
        model: Model on `device`; its decoder is left alone.
        heads: Training-only heads on `device`.
        stage: Settings.
        device: Where to compute.
    """
    trained = [
        model.vision_tower,
        model.text,
        model.visual_projection,
        heads,
        _Scalars(model),
    ]
    optimizers = build_optimizers(
        trained,
        stage.optimizer,
        hidden=[model.vision_tower.layers, model.text.text_model.encoder.layers],
    )
    clock = Clock(minutes=stage.minutes)
    saver = Checkpointer(
        path=stage.checkpoint,
        modules={"model": model, "vision_heads": heads},
        optimizers=optimizers,
        clock=clock,
        facts={
            "seed": stage.seed,
            "optimizer": stage.optimizer,
            "peak_learning_rate": stage.learning_rate,
            "images_per_step": BATCH_SIZE,
            "threads": torch.get_num_threads(),
        },
    )
    saver.resume()
    averages = Averages()
    batches = iter_batches(
        partial(collate_vision, model.design),
        seed=stage.seed + DATA_SEED_OFFSET,
        size=BATCH_SIZE,
        first=clock.step,
    )
    clock.skip()
    while clock.progress < 1:
        batch = next(batches).to(device)
        rate = clock.learning_rate(stage.learning_rate, hold=HOLD, floor=FLOOR)
        loss, figures = vision_loss(model, heads, batch)
        figures["grad"] = take_step(loss, optimizers, rate, CLIP)
        averages.add(**figures)
        clock.step += 1
        clock.tick()
        if clock.step % REPORT_EVERY == 0:
            averages.report("vision", clock, rate)
        saver.save_if_due()
    saver.save(finished=True)


def vision_loss(
    model: RefShapesModel, heads: VisionHeads, batch: VisionBatch
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Loss of one batch and the figures to log.

    Args:
        model: The model.
        heads: Training-only heads.
        batch: B images.

    Returns:
        A scalar, and figures by name.
    """
    size, tower = batch.images.shape[0], model.vision_tower
    with torch.autocast(batch.images.device.type, torch.bfloat16):
        states = tower(batch.images, roll=True)
        selected = tower.selected(states)
        color, shape, offsets = heads(selected)
        joint = model.visual_projection(tower.comparable(selected))
        patches = functional.normalize(joint.float(), dim=-1)
        whole = model.visual_projection(tower.whole(states))
        cls = functional.normalize(whole.float(), dim=-1)
        texts = torch.cat([batch.captions, batch.phrases.flatten(0, 1)])
        embeds = functional.normalize(model.encode_text(texts).float(), dim=-1)
    captions, phrases = embeds[:size], embeds[size:].unflatten(0, (size, -1))

    contrast = model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp() * cls @ captions.T
    diagonal = torch.arange(size, device=contrast.device)
    contrastive = (
        functional.cross_entropy(contrast, diagonal)
        + functional.cross_entropy(contrast.T, diagonal)
    ) / 2

    scores = torch.einsum("bnd,bpd->bpn", patches, phrases)
    scores = model.patch_text_scale.exp() * scores + model.patch_text_bias
    alignment = functional.binary_cross_entropy_with_logits(scores, batch.phrase_patches.float())

    color_loss = functional.cross_entropy(color.flatten(0, 1), batch.color.flatten())
    shape_loss = functional.cross_entropy(shape.flatten(0, 1), batch.shape.flatten())
    centers = torch.from_numpy(model.design.patches.centers()).to(batch.images.device)
    wanted = batch.boxes - centers
    box_loss = (offsets - wanted)[batch.covered].abs().mean()
    loss = color_loss + 2 * shape_loss + 10 * box_loss + 0.3 * contrastive + 2 * alignment
    with torch.no_grad():
        shown, hit = batch.covered, scores > 0
        figures: dict[str, float | Tensor] = {
            "loss": loss.detach(),
            "clip": contrastive.detach(),
            "retrieval": (contrast.argmax(1) == diagonal).float().mean(),
            "align": alignment.detach(),
            "align_recall": hit[batch.phrase_patches].float().mean(),
            "align_precision": batch.phrase_patches[hit].float().mean(),
            "box": box_loss.detach(),
            "color": (color.argmax(-1) == batch.color)[shown].float().mean(),
            "shape": (shape.argmax(-1) == batch.shape)[shown].float().mean(),
        }
    return loss, figures


class _Scalars(torch.nn.Module):
    """The model's loose scale and bias parameters as a module of their own."""

    def __init__(self, model: RefShapesModel) -> None:
        super().__init__()
        self.values = torch.nn.ParameterList(
            [model.logit_scale, model.patch_text_scale, model.patch_text_bias]
        )
