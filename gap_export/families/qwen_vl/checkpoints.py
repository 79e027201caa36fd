"""Checkpoints of Qwen's models, as published and as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import Weight, read_json_object
from gap_export.families.common.checkpoints.configs import check_architecture
from gap_export.families.common.checkpoints.lora import with_adapter
from gap_export.families.common.checkpoints.matching import (
    KeyLayout,
    match_tensors,
    parse_config,
    peek_config,
)
from gap_export.families.common.checkpoints.one_folder import source_of_folder
from gap_export.families.common.checkpoints.parts import index_folder
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.families.qwen_vl.canvas_weights import (
    interpolated_table,
    picked,
    stacked,
    summed_frames,
)
from gap_export.families.qwen_vl.configs import ConfigKind, check_rope_type, read_architecture
from gap_export.families.qwen_vl.vision import patch_places
from gap_export.spec.architecture import Architecture, VisionShape
from gap_export.spec.recipe import Recipe

_PATCHES = "tower.embeddings.patch_embedding.weight"
_TABLE = "tower.embeddings.position_embedding.weight"
# A model that reasons opens its turn with this, and its template says so where a turn begins. Its
# tokenizer is no sign: those of Qwen3's instruct models list the token, too.
_THINKING, _TURN_BEGINS = "<think>", "add_generation_prompt"
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_MAX_TEMPLATE = 1 << 20


@dataclass(frozen=True)
class QwenLayout:
    """One folder that holds everything.

    Attributes:
        kind: Which family it is of.
    """

    kind: ConfigKind

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self._model_type.replace('_', '-')}"

    @property
    def _model_type(self) -> str:
        return self.kind.config_class.model_type

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """By the model_type of config.json."""
        return peek_config(checkpoint.main).get("model_type") == self._model_type

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        folder = checkpoint.main
        found = index_folder(folder)
        file = folder / "config.json"
        check_rope_type(read_json_object(file), file)
        config: Any = parse_config(self.kind.config_class, file, num_tensors=len(found))
        architecture = read_architecture(self.kind, config, recipe.image, file)
        check_architecture(recipe, architecture, folder)
        vision, frames = architecture.vision, config.vision_config.temporal_patch_size
        keys = key_layout(self.kind, architecture)
        stored = match_tensors(
            found, _as_stored(expected(architecture), vision, frames), keys, where=folder
        )
        weights: dict[str, Weight] = {**stored, _PATCHES: summed_frames(stored[_PATCHES])}
        if vision.position_side is not None:
            weights[_TABLE] = _table(stored[_TABLE], architecture)
        source = source_of_folder(
            recipe,
            folder,
            config,
            architecture,
            weights,
            layout=self.name,
            image_token_id=config.image_token_id,
            files=(ref.file for ref in found.values()),
            notes=tuple(_notes(folder)),
        )
        return with_adapter(source, folder, keys)


def _table(stored: Weight, architecture: Architecture) -> Weight:
    """Positions of the patches, of one canvas after the other."""
    patches, (down, across) = architecture.vision.patch_grid, architecture.joined_patches
    tables = []
    for rows, cols in architecture.vision.grids:
        table = interpolated_table(stored, (rows * down, cols * across))
        places = patch_places(patches, (down, across), (rows, cols))
        tables.append(picked(table, places[:, 0] * cols * across + places[:, 1]))
    return stacked(tables) if tables else interpolated_table(stored, patches)


def key_layout(kind: ConfigKind, architecture: Architecture) -> KeyLayout:
    """Names in the files: those on the hub, and those transformers has saved since 4.52."""
    vision = architecture.vision
    prefixes: list[tuple[str, str]] = []
    for root in ("model.visual.", "visual."):
        prefixes.append((f"{root}patch_embed.proj.", "tower.embeddings.patch_embedding."))
        prefixes.append((f"{root}pos_embed.", "tower.embeddings.position_embedding."))
        prefixes += [
            (f"{root}blocks.{index}.mlp.{theirs}.", f"tower.encoder.layers.{index}.mlp.{ours}.")
            for index in range(vision.num_layers)
            for ours, theirs in kind.mlp.items()
        ]
        prefixes.append((f"{root}blocks.", "tower.encoder.layers."))
        main = "projector.main" if vision.taps else "projector"
        mergers = {f"{root}merger": main} | {
            f"{root}deepstack_merger_list.{tap}": f"projector.taps.{tap}"
            for tap in range(len(vision.taps))
        }
        prefixes += [
            (f"{merger}.{theirs}.", f"{module}.{ours}.")
            for merger, module in mergers.items()
            for ours, theirs in kind.merger.items()
        ]
    prefixes += [("model.language_model.", "decoder."), ("model.", "decoder.")]
    return KeyLayout(prefixes=tuple(prefixes), ignored_suffixes=(".rotary_emb.inv_freq",)).tying(
        head=architecture.decoder.tied_embeddings
    )


def _as_stored(
    expected: Mapping[str, tuple[int, ...]], vision: VisionShape, frames: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors as files hold them, whatever the canvas."""
    width, _, *patch = expected[_PATCHES]
    stored = {**expected, _PATCHES: (width, 3, frames, *patch)}
    if vision.position_side is not None:
        stored[_TABLE] = (vision.position_side**2, width)
    return stored


def _notes(folder: Path) -> Iterator[str]:
    """That the model reasons before it answers, where its chat template shows it."""
    for name in _TEMPLATES:
        file = folder / name
        if not file.is_file() or file.stat().st_size > _MAX_TEMPLATE:
            continue
        if _THINKING in _template(file).rpartition(_TURN_BEGINS)[2]:
            yield (
                f"{file} opens answers with {_THINKING}: this is a thinking variant, whose answers "
                "carry reasoning before the box; they may need many more new tokens than the "
                "recipe's max_new_tokens"
            )
            return


def _template(file: Path) -> str:
    """The chat template in a file; empty where that has none."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".json":
        return text
    try:
        plain = json.loads(text)
    except ValueError:
        return ""
    found = plain.get("chat_template") if isinstance(plain, dict) else None
    return found if isinstance(found, str) else ""
