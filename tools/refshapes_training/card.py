"""Model card and log, written from what a run left behind; no figure is typed in."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers

from gap_export.evaluation.refshapes import (
    IMAGE_SIZE,
    PATCH_SIZE,
    Scene,
    generate_scene,
    iter_samples,
)
from gap_export.evaluation.refshapes.objects import LAYOUT_PROBABILITIES, LAYOUTS
from refshapes_training.loop import load_state
from refshapes_training.model import NUM_PATCHES, RefShapesModel

_DATA_SAMPLES = 2000


def write_card(
    folder: Path, *, model: RefShapesModel, work_dir: Path, log: Path, note: str | None
) -> None:
    """Write README.md and training_log.txt beside the weights.

    Args:
        folder: Folder of the checkpoint; its name is the model's.
        model: The exported model, for its size.
        work_dir: Folder with the training checkpoints.
        log: Log of the run.
        note: What whoever ran it has to say about the run.
    """
    shutil.copyfile(log, folder / "training_log.txt")
    settings = {
        stage: load_state(path)["facts"]
        for stage in ("vision", "language")
        if (path := work_dir / f"{stage}.pt").exists()
    }
    parts = [
        _introduction(folder.name, model, settings),
        _data_section(),
        _training_section(settings),
        *([f"{textwrap.fill(note, 100)}\n"] if note else []),
        _FIGURES,
        _LIMITS,
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _introduction(name: str, model: RefShapesModel, settings: dict[str, dict[str, object]]) -> str:
    size = sum(p.numel() for p in model.llava.parameters())
    text_size = sum(p.numel() for p in model.text.parameters())
    language = settings.get("language", {})
    dropout = language.get("token_dropout", 0.0)
    if dropout:
        claim = (
            f"**Trained with visual-token dropout (up to {dropout:.0%}, at original ids)**: what "
            "it recovers under pruning is partly by construction. Never mix its figures with those "
            "of the model trained without."
        )
    else:
        claim = (
            "**It has never seen a dropped or pruned token**: what GAP brings back is "
            "training-free. An LLM that was pre-trained on text looks at its first token where a "
            "head has nothing to say; this decoder met no text without a picture, so a loss "
            f"(weight {language.get('background_weight')}) keeps its attention off empty "
            "background, which is always there in training and not always after pruning."
        )
    patch, picture = f"{PATCH_SIZE}x{PATCH_SIZE}", f"{IMAGE_SIZE}x{IMAGE_SIZE}"
    return f"""# {name}

A genuine, very small LLaVA (`LlavaForConditionalGeneration`: CLIP vision tower with [CLS], a
two-layer projector, Llama decoder with RoPE) that answers a referring expression with a box, as
LLaVA does: `[0.12, 0.34, 0.56, 0.78]`, fractions of the image (x1, y1, x2, y2). {size:,}
parameters, float32.
`clip/` holds a `CLIPTextModelWithProjection` ({text_size:,} parameters) and
`visual_projection.safetensors`, which belong to the same vision tower.

{textwrap.fill(claim, 100)}

Prompt: `<s> USER: <image> {{expression}} ASSISTANT:` with `<image>` repeated {NUM_PATCHES} times,
one for each {patch} patch of a {picture} picture: visual ids 2..145, text
from 146. Patch-text similarity: visual_projection(post_layernorm(hidden_states[-2])) of a patch,
dotted with the text embedding of `<s> {{expression}} </s>`; larger means more alike.

This page is written by `tools/train_refshapes.py` from the run's own files. Trained from nothing on
synthetic pictures: no third-party weights or data are in it.
"""


def _data_section() -> str:
    samples = list(iter_samples(seed=0, num_samples=_DATA_SAMPLES))
    scenes: dict[int, Scene] = {s.scene.index: s.scene for s in samples}
    kinds = Counter(s.expression.kind for s in samples)
    boxes = np.array([s.box for s in samples])
    cells = (boxes[:, 2:] - 1) // PATCH_SIZE - boxes[:, :2] // PATCH_SIZE + 1
    by_box = cells.prod(1) / NUM_PATCHES
    by_mask = np.array([(s.scene.object_map == s.expression.target).mean() for s in samples])
    counts = np.array([len(scene.objects) for scene in scenes.values()])
    small = np.mean([s.scene.objects[s.expression.target].size == "small" for s in samples])
    shares = ", ".join(f"{kind} {n / len(samples):.0%}" for kind, n in kinds.most_common())
    low, high = np.percentile(by_box, [5, 95])
    mosaics = LAYOUT_PROBABILITIES["train"][LAYOUTS.index("mosaic")]
    probe = generate_scene(split="heldout", seed=0, index=0)
    asked = "; ".join(f"*{e.text}*" for e in probe.expressions[:4])
    return f"""## Data: RefShapes

`gap_export.evaluation.refshapes`, rendered on the fly; train and held-out scenes differ in the key
of their random generator, and {mosaics:.0%} of the training scenes are an augmentation that the
held-out set has not: mosaics, objects edge to edge without background. Measured
on the held-out questions of seed 0 ({len(samples)} questions,
{len(scenes)} pictures):

- kinds: {shares}
- objects in a picture: mean {counts.mean():.1f}, from {counts.min()} to {counts.max()};
  {small:.0%} of the targets are small
- a target's box meets {by_box.mean():.1%} of the {NUM_PATCHES} patches on average (5th to 95th
  percentile {low:.1%} to {high:.1%}); it is the main content of {by_mask.mean():.1%}
- for example: {asked}
"""


def _training_section(settings: dict[str, dict[str, object]]) -> str:
    lines = ["## Training", "", "| stage | " + " | ".join(settings) + " |"]
    lines.append("|---" * (len(settings) + 1) + "|")
    names = dict.fromkeys(name for facts in settings.values() for name in facts)
    for name in names:
        cells = (_format(facts.get(name, "")) for facts in settings.values())
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}, bf16 autocast on "
        f"{'a GPU' if torch.cuda.is_available() else 'the CPU'}. The whole log is in "
        "`training_log.txt`. The vision stage trains both towers (contrastive, dense patch and "
        "patch-text losses, the position table shifted at random so that absolute places can only "
        "come from RoPE); the language stage trains projector and decoder on the frozen tower, "
        "with losses on attention: off empty background, and, in its second half, spread over "
        "all patches of the target.",
        "",
    ]
    return "\n".join(lines)


def _format(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_FIGURES = """## Figures

<!-- figures:accuracy -->
Not measured yet: `tools/readme_figures.py` measures this checkpoint and writes them here.
<!-- /figures:accuracy -->
"""

_LIMITS = """## Limits

It knows the words, shapes and colours of RefShapes and nothing else. It is here to show, on a
laptop and for real, what compact position ids do to grounding and what original ones restore;
figures of a full-size model differ.
"""
