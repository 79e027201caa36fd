"""A demo model in PyTorch, its questions, and what its tower saw of their images.

Nothing is exported per pruner: tower features are computed once, tokens are chosen of them by any
pruner, and the answers are decoded greedily by the package's own loop, many questions at a time.

Shape letters: I images, T rows of an image (its tiles; 1 where it is not cut), Q questions, B rows,
N tokens of a row, K kept, V visual tokens of an image.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from refshapes_training.batching import object_map
from refshapes_training.designs import DESIGNS

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import resolve_model
from gap_export.evaluation.refshapes import Sample, Split, iter_samples
from gap_export.exporting import ExportOptions, GraphCache, export_model
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.families import (
    Reference,
    build_reference,
    find_readings,
    resolve_pruning,
)
from gap_export.families.common.modules.projector import TappedProjector, embeds_of
from gap_export.pruning import (
    PRESETS,
    ChoosingPruner,
    FixedPruner,
    Preset,
    ScoringPruner,
    VisionState,
)
from gap_export.pruning.emit import emit_kept, emit_scored
from gap_export.pruning.probe import fixed_places
from gap_export.pruning.pruner import TEXT_READINGS
from gap_export.pruning.select import put_in_order
from gap_export.runtime.answers import read_answer
from gap_export.runtime.generation import (
    PromptRow,
    assemble_prompt,
    embed_tokens,
    generate,
)
from gap_export.runtime.image_view import PreparedImage
from gap_export.runtime.images.image import read_image
from gap_export.runtime.images.preparations import tile_layout
from gap_export.runtime.prompt import PromptEncoder
from gap_export.runtime.texts import encode_texts
from gap_export.spec.manifest import PruningSpec
from gap_export.spec.requests import PruningRequest
from gap_export.spec.tiles import TileStack, stack_tiles

Box = tuple[float, float, float, float]
_IMAGES_AT_ONCE, _QUESTIONS_AT_ONCE = 32, 64
# What a pruner reads that is the same for all images, and one that reads it.
_OF_ALL_IMAGES = {"places": "nuwa-received", "rope_sums": "ivc-extent"}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a pruner leaves for a question.

    Attributes:
        features: [M, H], as the decoder reads them.
        keep_indices: int64 [M], in the order they are fed.
        survivors: int64 [M'], without an extra token.
    """

    features: NDArray[np.float32]
    keep_indices: NDArray[np.int64]
    survivors: NDArray[np.int64]


class TrialModel(AbstractContextManager["TrialModel"]):
    """A demo model and Q questions about it; a context manager, which holds a folder.

    Attributes:
        samples: The questions.
        owners: int64 [Q, V], of each visual token the object it shows, -1 for the ground.
    """

    def __init__(self, name: str, *, num_samples: int, split: Split, seed: int = 0) -> None:
        """Build the model and run its tower on every image."""
        self._folder = tempfile.TemporaryDirectory(prefix="pruner-trials-")
        self._cache = GraphCache()
        self.recipe, self._checkpoint = resolve_model(name)
        self.readings = find_readings(self.recipe)
        self._reference = self._build("spatial")
        self._backend = TorchBackend(self._reference)
        self._home, self.manifest = self._export("spatial")
        self.samples = list(iter_samples(seed=seed, num_samples=num_samples, split=split))
        self._image_of = self._count_images()
        cells = DESIGNS[name].tokens
        maps = [object_map(scene, cells) for scene in self._scenes]
        self.owners = np.stack([maps[number] for number in self._image_of])
        self.corners = 96 * cells.corners()
        self._prepared = [
            PreparedImage.of(
                read_image(scene.image, pad_color=self.manifest.image.pad_color), self.manifest
            )
            for scene in self._scenes
        ]
        self._texts: dict[Hashable, torch.Tensor] = {}
        self._rows_of_text = self._embed_prompts()
        self._state = self._look()

    def __exit__(self, *error: object) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    @property
    def num_tiles(self) -> int:
        """T."""
        return len(self._prepared[0].pixel_values)

    def state(self, preset: Preset, questions: slice) -> VisionState:
        """What the pruner reads, a row for each of the questions (times tiles).

        Args:
            preset: Whose texts are read.
            questions: Which.
        """
        images = torch.from_numpy(self._image_of[questions])
        rows = (images[:, None] * self.num_tiles + torch.arange(self.num_tiles)).reshape(-1)
        parts: dict[str, Any] = {
            field.name: value.index_select(0, rows)
            for field in fields(VisionState)
            if field.name not in _OF_ALL_IMAGES
            and isinstance(value := getattr(self._state, field.name), torch.Tensor)
        }
        reads = preset.pruner.reads
        if preset.pruner.reads_text:
            texts = self._texts_of(preset)[questions].repeat_interleave(self.num_tiles, dim=0)
            parts["word_embeds" if "llm_text" in reads else "text_embeds"] = texts
        tower = self.recipe.text_tower
        sign = tower.similarity_sign if tower is not None and "text" in reads else 1
        return replace(self._state, **parts, text_similarity_sign=sign)

    def prune(self, preset: Preset, keep_ratio: float) -> list[Kept]:
        """What is left for each question."""
        request = PruningRequest(pruner=preset.name, keep_ratio=keep_ratio)
        return self.prune_as(preset, resolve_pruning(self.recipe, request))

    def prune_as(self, preset: Preset, spec: PruningSpec) -> list[Kept]:
        """As :meth:`prune`, of a preset that no registry knows too."""
        found: list[Kept] = []
        for start in range(0, len(self.samples), _QUESTIONS_AT_ONCE):
            questions = slice(start, start + _QUESTIONS_AT_ONCE)
            with torch.inference_mode():
                emitted = self._emit(preset, spec, self.state(preset, questions))
            found += self._join(spec, *(part.numpy() for part in emitted))
        return found

    def answer(
        self, kept: Sequence[Kept], *, count: Callable[[Kept], NDArray[np.int64]] | None = None
    ) -> list[Box | None]:
        """The box of each question in pixels, found by the tokens that are left, with GAP.

        Args:
            kept: From :meth:`prune`.
            count: Says as how many each token counts in attention; None: as one.
        """
        boxes: list[Box | None] = []
        for start in range(0, len(kept), _QUESTIONS_AT_ONCE):
            questions = range(start, min(start + _QUESTIONS_AT_ONCE, len(kept)))
            rows = [
                replace(
                    self._rows_of_text[number],
                    image_features=kept[number].features,
                    keep_indices=kept[number].keep_indices,
                    counts=None if count is None else count(kept[number]),
                )
                for number in questions
            ]
            prompt = assemble_prompt(
                rows, positions="gap", position_axes=self.manifest.decoder.position_axes
            )
            answers = generate(
                self._backend,
                prompt,
                max_new_tokens=self.manifest.prompt.max_new_tokens,
                eos_token_ids=self.manifest.decoder.eos_token_ids,
            )
            for number, tokens in zip(questions, answers.token_ids, strict=True):
                geometry = self._prepared[self._image_of[number]].geometry
                text = self._encoder.decode(tokens)
                found = read_answer(text, tokens, self.manifest, geometry)[0]
                boxes.append(found[0].box if found else None)
        return boxes

    def _build(self, pruner: str) -> Reference:
        # Its decoder takes any counts; where all are 1 it is the plain one.
        request = PruningRequest(pruner=pruner, keep_ratio=1.0, attention="proportional")
        spec = resolve_pruning(self.recipe, request)
        return build_reference(self.recipe, self._checkpoint, spec, device="cpu")

    def _export(self, pruner: str) -> tuple[Path, Any]:
        """A bundle, for its manifest and its tokenizers."""
        out = Path(self._folder.name) / pruner
        options = ExportOptions(
            model=self.recipe.name,
            pruning=PruningRequest(pruner=pruner, keep_ratio=1.0),
            out=out,
        )
        export_model(options, cache=self._cache)
        return out, open_bundle(out).manifest

    def _count_images(self) -> NDArray[np.int64]:
        numbers: dict[int, int] = {}
        self._scenes = []
        for sample in self.samples:
            if sample.scene.index not in numbers:
                numbers[sample.scene.index] = len(numbers)
                self._scenes.append(sample.scene)
        return np.array([numbers[sample.scene.index] for sample in self.samples])

    def _embed_prompts(self) -> list[PromptRow]:
        self._encoder = PromptEncoder(self.manifest, self._home)
        shape = None
        if self.num_tiles == 1:
            shape = (self.recipe.grid.rows, self.recipe.grid.cols)
        found = []
        for sample in self.samples:
            row = self._encoder.encode(sample.expression.text)
            start, ids = len(row.prefix_ids), np.concatenate([row.prefix_ids, row.suffix_ids])
            (embeds,) = embed_tokens(self._backend, ids[None])
            found.append(
                PromptRow(
                    prefix_embeds=embeds[:start],
                    suffix_embeds=embeds[start:],
                    image_features=embeds[:0],
                    keep_indices=np.zeros(0, np.int64),
                    num_visual_tokens=self.owners.shape[1],
                    grid=shape,
                )
            )
        return found

    def _look(self) -> VisionState:
        """Everything that any pruner reads of the images, [I * T, ...]."""
        encoder: Any = self._reference.vision_encoder
        joint = next_layer = None
        if "text" in self.readings:
            joint = self._build_part("text").joint_space
        if "next_layer" in self.readings:
            next_layer = self._build_part("prumerge-select").next_layer
        seen: list[VisionState] = []
        for start in range(0, len(self._prepared), _IMAGES_AT_ONCE):
            some = self._prepared[start : start + _IMAGES_AT_ONCE]
            pixels = torch.from_numpy(np.concatenate([one.pixel_values for one in some]))
            with torch.inference_mode():
                features = encoder.tower(pixels)
                received = features.received_attention
                attention, keys = (None, None) if next_layer is None else next_layer(features)
                seen.append(
                    VisionState(
                        patch_features=features.patches,
                        cls_features=features.cls,
                        cls_attention=features.cls_attention,
                        received_attention=received() if callable(received) else received,
                        keys=features.keys,
                        next_attention=attention,
                        next_keys=keys,
                        image_embeds=embeds_of(encoder.projector, features.patches),
                        patch_embeds=None if joint is None else joint(features.patches),
                    )
                )
        joined = {
            field.name: torch.cat([getattr(one, field.name) for one in seen])
            for field in fields(VisionState)
            if isinstance(getattr(seen[0], field.name), torch.Tensor)
        }
        for reading, reader in _OF_ALL_IMAGES.items():
            constants = self._build(reader).component("vision_encoder").constants
            joined[reading] = torch.from_numpy(constants[reading])
        return VisionState(**joined)

    def _build_part(self, pruner: str) -> Any:
        return self._build(pruner).vision_encoder

    def _texts_of(self, preset: Preset) -> torch.Tensor:
        """[Q, E or H], of each question what the pruner reads."""
        # A trial that no registry knows reads the expression's words.
        known = preset.name if preset.name in PRESETS else "text-llm"
        one = PRESETS[known]
        key = (one.pruner.reads & TEXT_READINGS, one.pruner_text, one.long_texts)
        if key not in self._texts:
            home, manifest = self._export(known)
            encoder = PromptEncoder(manifest, home)
            encoded = [encoder.encode(sample.expression.text) for sample in self.samples]
            backend = TorchBackend(self._build(known))
            self._texts[key] = torch.from_numpy(encode_texts(backend, encoded, manifest))
        return self._texts[key]

    def _emit(
        self, preset: Preset, spec: PruningSpec, state: VisionState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """image_features [B, K', H] and keep_indices int64 [B, K']."""
        pruner, grid = preset.pruner, self.recipe.grid
        projector: Any = self._reference.vision_encoder.projector
        if isinstance(projector, TappedProjector):
            emitted = replace(state, image_embeds=None)
        else:
            emitted = state
        how: dict[str, Any] = {"pruning": spec, "grid": grid, "project": projector}
        if isinstance(pruner, ScoringPruner):
            scores = pruner.scores(state)
            return emit_scored(pruner, emitted, scores, num_kept_tokens=spec.num_kept_tokens, **how)
        if isinstance(pruner, ChoosingPruner):
            chosen = pruner.choose(state, num_kept_tokens=spec.num_kept_tokens)
            keep = put_in_order(chosen, order=spec.order)
        else:
            assert isinstance(pruner, FixedPruner)
            places = torch.from_numpy(np.sort(fixed_places(pruner, spec, grid)))
            keep = places.expand(len(state.patch_features), -1)
        return emit_kept(emitted, keep, **how)

    def _join(
        self, spec: PruningSpec, features: NDArray[Any], keep: NDArray[np.int64]
    ) -> Iterator[Kept]:
        """Rows to questions: tiles one behind the other."""
        if self.num_tiles == 1:
            for row, indices in zip(features, keep, strict=True):
                yield Kept(
                    features=row, keep_indices=indices, survivors=indices[: spec.num_kept_tokens]
                )
            return
        layout = tile_layout(self._prepared[0].geometry, self.manifest.image, self.manifest.grid)
        assert isinstance(layout, TileStack), "demo models have no rows of tiles"
        for start in range(0, len(keep), self.num_tiles):
            rows = slice(start, start + self.num_tiles)
            tokens = stack_tiles(keep[rows], layout)
            yield Kept(
                features=np.concatenate(list(features[rows]))[tokens.source],
                keep_indices=tokens.keep_indices,
                survivors=tokens.keep_indices,
            )


def overlap(box: Box | None, truth: Sequence[float]) -> float:
    """Intersection over union of two boxes in pixels; 0 where there is none."""
    if box is None:
        return 0.0
    width = min(box[2], truth[2]) - max(box[0], truth[0])
    height = min(box[3], truth[3]) - max(box[1], truth[1])
    inner = max(width, 0.0) * max(height, 0.0)
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (box, truth)]
    return inner / (sum(areas) - inner)


def hits(boxes: Sequence[Box | None], samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """Which answers count at 0.5, bool [Q]."""
    return np.array(
        [overlap(box, sample.box) > 0.5 for box, sample in zip(boxes, samples, strict=True)]
    )
