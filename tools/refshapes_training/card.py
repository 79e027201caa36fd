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
    Scene,
    generate_scene,
    iter_samples,
)
from gap_export.evaluation.refshapes.objects import LAYOUT_PROBABILITIES, LAYOUTS
from refshapes_training.batching import object_map
from refshapes_training.designs import (
    DESIGNS,
    INTERNVL,
    LLAVA,
    MINIGPT_V2,
    QWEN3_VL,
    SHIKRA,
    Design,
)
from refshapes_training.loop import load_state
from refshapes_training.model import RefShapesModel

_DATA_SAMPLES = 2000


def write_card(
    folder: Path, *, model: RefShapesModel, work_dir: Path, log: Path, note: str | None
) -> None:
    """Write README.md and training_log.txt beside the weights.

    Args:
        folder: Folder of the checkpoint.
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
        _introduction(model, settings),
        _data_section(model.design),
        _training_section(model.design, settings),
        *([f"{textwrap.fill(note, 100)}\n"] if note else []),
        _FIGURES,
        _LIMITS,
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _introduction(model: RefShapesModel, settings: dict[str, dict[str, object]]) -> str:
    design = model.design
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
            "head has nothing to say; this decoder met no text without an image, so a loss "
            f"(weight {language.get('background_weight')}) keeps its attention off empty "
            "background, which is always there in training and not always after pruning."
        )
    parts = (model.vision_tower, model.projector, model.decoder, model.lm_head)
    size = sum(p.numel() for part in parts for p in part.parameters())
    paragraphs = [
        f"{_WHAT[design.name]} {size:,} parameters, float32.",
        _text_tower(model),
        claim,
        _prompt(model),
        "This page is written by `tools/train_refshapes.py` from the run's own files. "
        + _origin(design)
        + " No third-party weights or data are in it.",
    ]
    filled = (textwrap.fill(text, 100, break_on_hyphens=False) for text in paragraphs)
    return f"# {design.name}\n\n" + "\n\n".join(filled) + "\n"


def _text_tower(model: RefShapesModel) -> str:
    if not model.design.has_text_tower:
        return (
            "There is no text tower, as in the model it stands for. `text`, `trim` and `cdpruner` "
            "do not apply, and the exporter refuses them."
        )
    size = sum(p.numel() for p in model.text.parameters())
    return (
        f"`clip/` holds a `CLIPTextModelWithProjection` ({size:,} parameters) and "
        "`visual_projection.safetensors`, which belong to the same vision tower. Patch-text "
        "similarity: visual_projection(post_layernorm(hidden_states[-2])) of a patch, dotted with "
        "the text embedding of `<s> {expression} </s>`; larger means more alike."
    )


def _prompt(model: RefShapesModel) -> str:
    design = model.design
    before, behind, asking = (
        " ".join(part) for part in (design.before, design.behind, design.asking)
    )
    words = f"{before} [image] {behind} {{expression}} {asking}".replace("  ", " ")
    rows, columns = design.tokens.grids[0]
    height, width = IMAGE_SIZE / rows, IMAGE_SIZE / columns
    start, end = design.visual_start, design.visual_end
    if design.position_axes > 1:
        ids = (
            f"on the axes of time, row and column the ids of a token are {start}, {start} + row "
            f"and {start} + column, and text goes on at {start + max(rows, columns)}."
        )
    else:
        ids = f"position ids {start}..{end - 1}, text goes on at {end}."
    of_tiles = "" if design.tile is None else _TILES
    return (
        f"Prompt: `{words}`. The {IMAGE_SIZE}x{IMAGE_SIZE} image is {design.num_tokens} visual "
        f"tokens, {rows} rows of {columns}, each {width:.3g} px wide and {height:.3g} px high"
        f"{of_tiles}: {ids}"
    )


def _origin(design: Design) -> str:
    if design.starts_from is None:
        return "Trained from nothing on synthetic images."
    same_tower = DESIGNS[design.starts_from].tower == design.tower
    tower = (
        "its vision tower and text tower, which stay as they are (Shikra and LLaVA share CLIP's "
        "tower too)"
        if same_tower
        else "the layers of its vision tower, with patches and positions resized and trained on"
    )
    return (
        f"The run starts from `{design.starts_from}`: its decoder, its words, and {tower}; the "
        "projector and all tokens that it does not know are new. Everything before that was "
        "trained from nothing on synthetic images."
    )


def _data_section(design: Design) -> str:
    samples = list(iter_samples(seed=0, num_samples=_DATA_SAMPLES))
    scenes: dict[int, Scene] = {s.scene.index: s.scene for s in samples}
    kinds = Counter(s.expression.kind for s in samples)
    cells = design.tokens
    boxes = np.array([s.box for s in samples])[:, None] / IMAGE_SIZE
    corners = cells.corners()
    meets = (boxes[..., :2] < corners[:, 2:]) & (corners[:, :2] < boxes[..., 2:])
    by_box = meets.all(2).mean(1)
    maps = {index: object_map(scene, cells) for index, scene in scenes.items()}
    by_mask = np.array([(maps[s.scene.index] == s.expression.target).mean() for s in samples])
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
{len(scenes)} images):

- kinds: {shares}
- objects in an image: mean {counts.mean():.1f}, from {counts.min()} to {counts.max()};
  {small:.0%} of the targets are small
- a target's box meets {by_box.mean():.1%} of the {design.num_tokens} visual tokens on average (5th
  to 95th percentile {low:.1%} to {high:.1%}); it is the main content of {by_mask.mean():.1%}
- for example: {asked}
"""


def _training_section(design: Design, settings: dict[str, dict[str, object]]) -> str:
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
        f"`training_log.txt`. {_stages(design)}",
        "",
    ]
    return "\n".join(lines)


def _stages(design: Design) -> str:
    vision = (
        "The vision stage trains both towers (contrastive, dense patch and patch-text losses, "
        f"{_NO_PLACES[design.tower]} so that absolute places can only come from position ids)"
    )
    start = DESIGNS.get(design.starts_from or "")
    if start is not None and start.tower == design.tower:
        vision = f"There is no vision stage: the towers are those of `{start.name}`"
    elif not design.has_text_tower:
        vision += ", of which the text tower is thrown away"
    return (
        f"{vision}; the language stage trains projector and decoder on the frozen tower, with "
        "losses on attention: off empty background, and, in its second half, spread over all "
        "tokens of the target."
    )


def _format(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_TABLE_SHIFTED = "the position table shifted at random"
_NO_PLACES = {
    "clip": _TABLE_SHIFTED,
    "eva": _TABLE_SHIFTED,
    "internvl": _TABLE_SHIFTED,
    "qwen3_vl": "without a table of positions",
}
_WHAT = {
    LLAVA.name: "A genuine, very small LLaVA (`LlavaForConditionalGeneration`: CLIP vision tower "
    "with [CLS], a two-layer projector, Llama decoder with RoPE) that answers a referring "
    "expression with a box, as LLaVA does: `[0.12, 0.34, 0.56, 0.78]`, fractions of the image "
    "(x1, y1, x2, y2).",
    SHIKRA.name: "A very small Shikra: CLIP vision tower with [CLS], one linear projector, "
    "the image in mid-sentence between `<im_start>` and `<im_end>`, Llama decoder with RoPE. It "
    "answers a referring expression with a box as Shikra does: `[0.123,0.345,0.567,0.789]`, "
    "fractions of the padded square (x1, y1, x2, y2).",
    QWEN3_VL.name: "A genuine, very small Qwen3-VL (`Qwen3VLForConditionalGeneration`: vision "
    "tower with 2-D rotary positions, four patches merged to one visual token, two DeepStack taps, "
    "Qwen3 decoder with interleaved M-RoPE) that answers a referring expression with a box, as "
    'Qwen3-VL does: `{"bbox_2d":[123,456,789,900]}`, thousandths of the image (x1, y1, x2, y2).',
    INTERNVL.name: "A genuine, very small InternVL (`InternVLForConditionalGeneration`: InternViT "
    "with [CLS] and layer scale on tiles, four patches joined to one visual token, two-layer "
    "projector with a norm, Qwen2 decoder with RoPE) that answers a referring expression with a "
    "box, as InternVL does: `<box>[[123,456,789,900]]</box>`, thousandths of the image (x1, y1, "
    "x2, y2).",
    MINIGPT_V2.name: "A very small MiniGPT-v2: EVA's vision tower, four patches that follow each "
    "other in a row joined to one visual token, one linear layer as projector, Llama decoder with "
    "RoPE. It answers a referring expression with a box as MiniGPT-v2 does: `{<12><34><56><78>}`, "
    "hundredths of the image (x1, y1, x2, y2).",
}

_TILES = (
    ", in tiles one after the other, and behind them the whole image once more as a tile (the "
    "thumbnail)"
)

_FIGURES = """## Figures

<!-- figures:accuracy -->
Not measured yet: `tools/paper_table.py` measures this checkpoint and writes them here.
<!-- /figures:accuracy -->
"""

_LIMITS = """## Limits

It knows the words, shapes and colors of RefShapes and nothing else. It is here to show, on a
laptop and for real, what compact position ids do to grounding and what original ones restore;
figures of a full-size model differ.
"""
