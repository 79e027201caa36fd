"""Each family from a tiny checkpoint to answers: ONNX Runtime says what PyTorch says."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.exporting import ExportOptions, export_checkpoint
from gap_export.families import read_source
from gap_export.parity.question import Question
from gap_export.parity.results import CheckReport
from gap_export.runtime.session import Grounding, GroundingSession
from gap_export.spec.manifest import Manifest
from gap_export.spec.recipe import Recipe, load_recipe
from tests.conftest import COORDINATES, WORDS
from tests.families import rewriting, tiny_minigpt_v2, tiny_shikra
from tests.families.llava_layouts import (
    make_adapters,
    take_apart,
    with_parts,
    write_base,
    write_clip,
    write_lora,
    write_original,
)
from tests.families.tiny_llava_next import RESOLUTIONS, write_llava_next
from tests.parity.checking import check_with_torch, level_of, outputs
from tests.shared import sort_options

NUM_QUESTIONS = 20
# (width, height): what pads, what tiles in every way, and what is cut to almost nothing.
SIZES = [(40, 32), (32, 40), (64, 64), (30, 95), (120, 33), (9, 70), (101, 8), (33, 31)]

# Given the tiny LLaVA-1.5 and an empty folder: a checkpoint, and the recipe it goes by.
Write = Callable[[Path, Path], tuple[Recipe, Checkpoint]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint and how it is exported.

    Attributes:
        write: Makes the checkpoint.
        options: Of the export.
        dtype: What it must come out in.
        held: How its weight files must be in the bundle: ``shared``, or ``written``.
    """

    write: Write
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    held: str = "shared"


def llava(*changes: Callable[[rewriting.Tensors], rewriting.Tensors], shards: int = 1) -> Write:
    def write(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
        shutil.copytree(tiny, folder / "original")
        return changed(folder, changes, shards)

    return write


def llava_next(
    *changes: Callable[[rewriting.Tensors], rewriting.Tensors],
    decoder: Any = "llama",
    shards: int = 1,
) -> Write:
    def write(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
        write_llava_next(folder / "original", decoder=decoder)
        return changed(folder, changes, shards)

    return write


def with_text_tower(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
    _, checkpoint = llava_next()(tiny, folder)
    shutil.copytree(tiny / "clip", checkpoint.main / "clip")
    tower = {"folder": "clip", "similarity_sign": -1}
    return change_recipe(checkpoint.main, text_tower=tower), checkpoint


def llava_original(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
    from transformers import LlavaForConditionalGeneration

    pieces = take_apart(LlavaForConditionalGeneration.from_pretrained(tiny))
    main = write_original(folder / "main", pieces, form="safetensors-sharded")
    parts = {"main": main, "tower": write_clip(folder / "clip", pieces, form="bin")}
    return in_segments(load_recipe(tiny / "recipe.yaml")), Checkpoint(parts=parts)


def llava_lora(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
    from transformers import LlavaForConditionalGeneration

    pieces = take_apart(LlavaForConditionalGeneration.from_pretrained(tiny))
    parts = {
        "main": write_lora(folder / "main", pieces, make_adapters(pieces, rank=4)),
        "base": write_base(folder / "base", pieces),
        "tower": write_clip(folder / "clip", pieces),
    }
    return in_segments(load_recipe(tiny / "recipe.yaml")), Checkpoint(parts=parts)


def llava_next_original(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
    from transformers import LlavaNextForConditionalGeneration

    write_llava_next(folder / "hf", decoder="mistral")
    pieces = take_apart(LlavaNextForConditionalGeneration.from_pretrained(folder / "hf"))
    pieces.mm_config |= {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[width, height] for height, width in RESOLUTIONS],
        "unfreeze_mm_vision_tower": True,
    }
    main = write_original(
        folder / "main", pieces, form="bin", tower_inside=True, model_type="llava_mistral"
    )
    parts = {"main": main, "tower": write_clip(folder / "clip", pieces)}
    return in_segments(load_recipe(folder / "hf/recipe.yaml")), Checkpoint(parts=parts)


def shikra(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
    """A delta in float16, its base, and a whole CLIP in float32."""
    del tiny
    return tiny_shikra.shikra_recipe(), Checkpoint(
        parts=tiny_shikra.write_parts(folder, tiny_shikra.make_shikra())
    )


def minigpt_v2(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
    """Adapters and base in two shards, a tower whose positions are resized; all in float32."""
    del tiny
    return tiny_minigpt_v2.minigpt_recipe(), Checkpoint(
        parts=tiny_minigpt_v2.write_parts(folder, tiny_minigpt_v2.make_minigpt())
    )


def in_segments(recipe: Recipe) -> Recipe:
    """These layouts have no image token."""
    prompt = replace(recipe.prompt, tokenization="segments")
    return with_parts(recipe.model_copy(update={"prompt": prompt}))


def drawn(tiny: Path, folder: Path) -> tuple[Recipe, Checkpoint]:
    """No weights at all: of the sizes that the recipe says."""
    recipe, checkpoint = llava_next(decoder="mistral")(tiny, folder)
    sizes = read_source(recipe, checkpoint).architecture
    recipe = recipe.model_copy(
        update={"architecture": sizes, "special_tokens": {"<s>": 1, "</s>": 2, "<image>": 3}}
    )
    return recipe, Checkpoint(parts={}, random_seed=7)


def changed(folder: Path, changes: tuple[Any, ...], shards: int) -> tuple[Recipe, Checkpoint]:
    current = folder / "original"
    for number, change in enumerate(changes):
        current = rewriting.rewrite(current, folder / f"changed-{number}", change)
    if shards > 1:
        rewriting.shard(current, count=shards)
    # Weights that come with the package are copied, a user's are not.
    source = {"kind": "local", "parts": {"main": {"what": "weights"}}}
    return change_recipe(current, checkpoint=source), Checkpoint.of(current)


def change_recipe(folder: Path, **changes: Any) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    return load_recipe(file)


HALF = rewriting.cast_to({"": torch.float16})
BRAIN = rewriting.cast_to({"": torch.bfloat16})
MIXED = rewriting.cast_to({"multi_modal_projector.": torch.float32, "": torch.float16})

CASES = {
    "llava": Case(write=llava(), options={"pruner": "text"}),
    "llava-float16-as-it-is": Case(
        write=llava(HALF, shards=2), options={"pruner": "spatial"}, dtype="float16"
    ),
    "llava_next-mistral-cast": Case(
        write=llava_next(HALF, decoder="mistral"),
        options={"pruner": "fastervlm", "dtype": "float32"},
        held="written",
    ),
    "minigpt_v2": Case(
        write=minigpt_v2, options={"pruner": "cdpruner-llm"}, held="shared and written"
    ),
}
# What is computed from weights is written for adapters above and for a delta here.
MORE = {
    "shikra-delta": Case(
        write=shikra, options={"pruner": "text", "dtype": "float32"}, held="shared and written"
    ),
    "llava-4.52-names": Case(write=llava(rewriting.renamed(rewriting.TRANSFORMERS_4_52))),
    "minigpt_v2-cls": Case(write=minigpt_v2, options={"pruner": "cls"}, held="shared and written"),
    "llava-text-llm": Case(write=llava(), options={"pruner": "text-llm"}),
    "llava-bfloat16-cast": Case(
        write=llava(BRAIN),
        options={"dtype": "float32", "pruner": "text"},
        # The text tower was float32 all along.
        held="shared and written",
    ),
    "llava-to-float16": Case(
        write=llava(), options={"dtype": "float16"}, dtype="float16", held="written"
    ),
    "llava-original": Case(write=llava_original),
    "llava-lora": Case(write=llava_lora, options={"pruner": "cls"}, held="shared and written"),
    "llava_next-original": Case(write=llava_next_original),
    "llava-score-order": Case(write=llava(), options={"pruner": "cls", "order": "score"}),
    "llava_next-llama": Case(write=llava_next(shards=3), options={"pruner": "cls"}),
    "llava_next-float16": Case(
        write=llava_next(HALF), options={"pruner": "spatial"}, dtype="float16"
    ),
    "llava_next-mixed": Case(write=llava_next(MIXED), dtype="float16", held="shared and written"),
    "llava_next-text": Case(write=with_text_tower, options={"pruner": "text"}),
    "llava_next-compact": Case(write=llava_next(), options={"positions": "compact"}),
    "llava_next-random": Case(
        write=drawn, options={"dtype": "float32", "pruner": "cls"}, held="written"
    ),
    "llava_next-all": Case(write=llava_next(), options={"keep_ratio": 1.0}),
}


@dataclass(kw_only=True)
class Exported:
    """A case after the export."""

    case: Case
    bundle: Path
    recipe: Recipe
    checkpoint: Checkpoint
    manifest: Manifest

    @cached_property
    def answers(self) -> list[Grounding]:
        """Of the bundle as it is; several tests look at them."""
        return ask(self)


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)],
)
def exported(request, shared, tiny_checkpoint) -> Exported:
    case = (CASES | MORE)[request.param]

    def export(folder: Path) -> None:
        folder.mkdir()
        recipe, checkpoint = case.write(tiny_checkpoint, folder)
        flat = {"keep_ratio": 0.3, **case.options}
        options = ExportOptions(model=recipe.name, out=folder / "bundle", **sort_options(flat))
        export_checkpoint(recipe, checkpoint, options)
        (folder / "source").write_bytes(pickle.dumps((recipe, checkpoint)))

    folder = shared.once(f"family-{request.param}", export)
    recipe, checkpoint = pickle.loads((folder / "source").read_bytes())
    return Exported(
        case=case,
        bundle=folder / "bundle",
        recipe=recipe,
        checkpoint=checkpoint,
        manifest=open_bundle(folder / "bundle", verify="full").manifest,
    )


def questions() -> list[Question]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(NUM_QUESTIONS):
        width, height = SIZES[number % len(SIZES)]
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        words = rng.choice([*WORDS, *COORDINATES], size=1 + number % 5)
        found.append(Question(image=image, expression=" ".join(words)))
    return found


def ask(exported: Exported, positions: Any = None) -> list[Grounding]:
    with GroundingSession.open(exported.bundle, positions=positions) as session:
        return [session.ground(question.image, question.expression) for question in questions()]


def test_onnx_runtime_answers_as_pytorch_token_for_token(exported):
    report = check_with_torch(exported.bundle, exported.recipe, exported.checkpoint, questions())
    assert report.passed, report.to_plain()
    figures = level_of(report, "token").figures
    # Rounding may decide between two tokens in half precision, and nowhere else.
    undecided = figures["ties"] if exported.manifest.dtype == "float16" else 0
    assert undecided <= 0.2 * NUM_QUESTIONS
    assert figures["equal"] + undecided == figures["questions"] == NUM_QUESTIONS
    check_outputs(report, tiled=exported.recipe.image.tiles is not None)


def check_outputs(report: CheckReport, *, tiled: bool) -> None:
    compared = {row.tensor for row in outputs(report)}
    assert {"image_features", "keep_indices", "logits (prefill)", "logits (decode)"} <= compared
    assert ("image_newline" in compared) == tiled


def test_answers_depend_on_image_and_positions(exported):
    """Else equality would show little."""
    given = exported.answers
    assert len({answer.token_ids for answer in given}) > NUM_QUESTIONS // 4
    manifest = exported.manifest
    # Drawn weights are so small that attention looks everywhere alike.
    if manifest.source.random_seed is not None or manifest.pruning.positions == "compact":
        return
    compact = ask(exported, "compact")
    same = [a.token_ids for a in compact] == [a.token_ids for a in given]
    assert same == (manifest.pruning.keep_ratio == 1)


def test_weights_are_shared_where_the_dtype_stays(exported):
    manifest, case = exported.manifest, exported.case
    assert manifest.dtype == case.dtype
    for graph in manifest.graphs:
        floats = {t.dtype for t in (*graph.inputs, *graph.outputs) if t.dtype.startswith("float")}
        # Pixels are float32 in any case.
        assert floats <= {case.dtype, "float32"} and case.dtype in floats
    weights = {f.path: f for f in manifest.files if not f.path.endswith((".onnx", ".json"))}
    ours = {path for path, file in weights.items() if file.held == "written"}
    shared = {path for path, file in weights.items() if file.held in ("linked", "cloned")}
    assert ours | shared == set(weights)
    assert bool(ours) == ("written" in case.held) and bool(shared) == ("shared" in case.held)
    # A part is a folder, or a file.
    files = (
        file
        for part in exported.checkpoint.parts.values()
        for file in (part, *part.rglob("*"))
        if file.is_file()
    )
    theirs = {file.read_bytes() for file in files}
    assert all((exported.bundle / path).read_bytes() in theirs for path in shared)
    for path in ours:
        names = {"float32": "F32", "float16": "F16"}
        header = (exported.bundle / path).read_bytes()
        assert f'"dtype":"{names[case.dtype]}"'.encode() in header.replace(b" ", b"")


def test_every_visual_token_is_accounted_for(exported):
    pruning, per_view = exported.manifest.pruning, exported.recipe.grid.num_visual_tokens
    given = exported.answers
    for answer in given:
        kept = answer.keep_indices
        assert len(set(kept)) == len(kept) and max(kept) < answer.num_visual_tokens
        assert pruning.order == "score" or list(kept) == sorted(kept)
    totals = {answer.num_visual_tokens for answer in given}
    if exported.recipe.image.tiles is None:
        assert totals == {per_view}
        assert {len(answer.keep_indices) for answer in given} == {pruning.num_kept_tokens}
    else:
        # The base tile alone, where an image is too thin to fill one line of the others.
        assert min(totals) == per_view and len(totals) > 3
        assert all(
            len(answer.keep_indices) == answer.num_visual_tokens
            for answer in given
            if pruning.keep_ratio == 1
        )
