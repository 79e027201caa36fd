"""Reads Shikra: as published, a delta to the original LLaMA-7B, or merged with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import LlamaConfig

from gap_export.checkpoint.find.source import MAIN, Checkpoint
from gap_export.checkpoint.tokenizers.tokenizer_json import has_tokenizer, read_tokenizer
from gap_export.checkpoint.weights import Weight, add, add_rows, read_json_object
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.configs import (
    check_architecture,
    compare_facts,
    decoder_shape,
)
from gap_export.families.common.checkpoints.delta_base import check_delta_base, is_whole_model
from gap_export.families.common.checkpoints.matching import (
    build_config,
    main_dtype,
    match_tensors,
    peek_config,
)
from gap_export.families.common.checkpoints.parts import (
    LLAMA_KEYS,
    LanguageModel,
    Stored,
    check_base,
    end_of_answer,
    index_folder,
    read_clip_tower,
    read_language_model,
)
from gap_export.families.common.modules.expected import expected_language
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.spec.architecture import Architecture, ProjectorShape
from gap_export.spec.recipe import Recipe

logger = logging.getLogger(__name__)

BASE, TOWER = "base", "tower"
_KEYS = replace(
    LLAMA_KEYS,
    prefixes=(("model.mm_projector.", "projector.linear_1."), *LLAMA_KEYS.prefixes),
)
_FINAL_NORM = "model.norm.weight"
# Rows that the base has not got: added to LLaMA's vocabulary, in this order.
_ADDED_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
_WITH_ADDED_ROWS = ("decoder.embed_tokens.weight", "lm_head.weight")
# The published config's are LLaMA's first ones (0, 1, -1), which no tokenizer of it uses.
_WRONG_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class ShikraDeltaLayout:
    """The delta, the original LLaMA-7B (``base``) and CLIP ViT-L/14 of 224 px (``tower``).

    A tensor of the model is delta plus base, in the delta's dtype; the projector is as it is, and
    of embeddings and head the base has three rows fewer. Which base it must be is checked as far as
    it can be, see :mod:`gap_export.families.common.checkpoints.delta_base`.
    """

    name: str = "shikra-delta"

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """Shikra's config, unless the weights are whole."""
        return _is_shikra(checkpoint.main) and not _is_merged(checkpoint.main)

    def read(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        expected: Expected,  # noqa: ARG002 - each part is held against its own
    ) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        delta = _read_main(recipe, checkpoint)
        base = read_language_model(checkpoint.part(BASE, recipe))
        decoder = delta.architecture.decoder
        own_size = decoder.vocab_size - len(_ADDED_TOKENS)
        check_base(base, replace(decoder, vocab_size=own_size), recipe, role=BASE)
        check_delta_base(delta.weights, base, recipe, role=BASE)
        language: dict[str, Weight] = dict(delta.weights)
        for key, weight in base.weights.items():
            join = add_rows if key in _WITH_ADDED_ROWS else add
            language[key] = join(delta.weights[key], weight)
        return _source(recipe, delta, language, layout=self.name, base=base)


@dataclass(frozen=True, kw_only=True)
class ShikraMergedLayout:
    """What Shikra's own tool makes of delta and base; it needs no ``base``, only the ``tower``.

    Its config.json is the delta's, so the weights tell them apart: a delta's final norm is near
    zero. A base is never added to it.
    """

    name: str = "shikra-merged"

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """Shikra's config, and weights that are whole."""
        return _is_shikra(checkpoint.main) and _is_merged(checkpoint.main)

    def read(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        expected: Expected,  # noqa: ARG002 - each part is held against its own
    ) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        main = _read_main(recipe, checkpoint)
        if BASE in checkpoint.parts:
            logger.info("%s is whole: %s is not used", main.folder, checkpoint.parts[BASE])
        return _source(recipe, main, main.weights, layout=self.name, base=None)


@dataclass(frozen=True, kw_only=True)
class _Main:
    """The main part, checked, with the tower that it goes with.

    Attributes:
        folder: The main part.
        architecture: Sizes of the whole model.
        weights: ``projector.*``, ``decoder.*`` and ``lm_head.weight`` as they are in the files.
        tower: ``tower.*``.
        files: All files that were read, with their part.
    """

    folder: Path
    architecture: Architecture
    weights: Mapping[str, Stored]
    tower: Mapping[str, Stored]
    files: tuple[tuple[str, Path], ...]


def _is_shikra(folder: Path) -> bool:
    plain = peek_config(folder)
    kind = plain.get("model_type")
    return kind == "shikra" or (kind == "llama" and "mm_vision_tower" in plain)


def _is_merged(folder: Path) -> bool:
    """Whether the weights are whole; what cannot be read is for a reader to report."""
    try:
        norm = index_folder(folder).get(_FINAL_NORM)
        return norm is not None and is_whole_model(norm)
    except CheckpointError:
        return False


def _read_main(recipe: Recipe, checkpoint: Checkpoint) -> _Main:
    folder = checkpoint.main
    found = index_folder(folder)
    config_file = folder / "config.json"
    plain = read_json_object(config_file)
    layer = plain.get("mm_vision_select_layer", recipe.select_layer)
    compare_facts(recipe, config_file, [("mm_vision_select_layer", layer, recipe.select_layer)])
    as_llama = {key: value for key, value in plain.items() if key not in _WRONG_IDS}
    as_llama["model_type"] = LlamaConfig.model_type
    config = build_config(LlamaConfig, as_llama, config_file, num_tensors=len(found))
    decoder = decoder_shape(config, config_file)
    tower = read_clip_tower(checkpoint.part(TOWER, recipe))
    side = tower.shape.image_size
    wanted = [recipe.image.height, recipe.image.width]
    compare_facts(recipe, tower.folder, [("image size", [side, side], wanted)])
    projector = ProjectorShape(
        width=tower.shape.width, hidden_size=decoder.hidden_size, activation=None
    )
    architecture = Architecture(vision=tower.shape, projector=projector, decoder=decoder)
    check_architecture(recipe, architecture, folder)
    weights = match_tensors(found, expected_language(architecture), _KEYS, where=folder)
    files = (config_file, *sorted({ref.file for ref in found.values()}))
    return _Main(
        folder=folder,
        architecture=architecture,
        weights=weights,
        tower=tower.weights,
        files=(*((MAIN, file) for file in files), *((TOWER, file) for file in tower.files)),
    )


def _source(
    recipe: Recipe,
    main: _Main,
    language: Mapping[str, Weight],
    *,
    layout: str,
    base: LanguageModel | None,
) -> ModelSource:
    """The model; its tokenizer is the main part's, else the base's."""
    weights: dict[str, Weight] = {**main.tower, **language}
    home = main.folder if base is None or has_tokenizer(main.folder) else base.folder
    return ModelSource(
        layout=layout,
        architecture=main.architecture,
        weights=weights,
        dtype=main_dtype(weights),
        eos_token_ids=end_of_answer(recipe),
        image_token_id=None,
        tokenizer=read_tokenizer(home, recipe),
        files=(*main.files, *((BASE, file) for file in (base.files if base is not None else ()))),
    )
