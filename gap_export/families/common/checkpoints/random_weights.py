"""Weights of the true shape without a checkpoint, for work on latency and engines."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

from gap_export.checkpoint.weights import Weight, filled, random_normal
from gap_export.errors import UsageError
from gap_export.families.common.checkpoints.clip_text_tower import TextTowerSource
from gap_export.families.common.modules.expected import expected_text_tensors
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.spec.recipe import Recipe

_DTYPE = "F16"
# Small enough that nothing overflows float16 on the way through dozens of layers.
_STD = 0.02


def random_source(recipe: Recipe, expected: Expected, *, seed: int) -> ModelSource:
    """A model of the recipe's sizes whose weights are drawn from a seed.

    Args:
        recipe: Has an ``architecture``.
        expected: Gives the shape of every tensor.
        seed: The same seed gives the same weights.

    Raises:
        UsageError: the recipe says no sizes.
    """
    if recipe.architecture is None:
        raise UsageError(
            f"recipe {recipe.name} does not say its sizes, so there is nothing to draw",
            seen="--random-weights",
            fix="leave it out: the weights are here, or add architecture to the recipe",
        )
    tokens = recipe.special_tokens
    weights = _draw(expected(recipe.architecture), seed)
    if recipe.architecture.decoder.tied_embeddings:
        weights["lm_head.weight"] = weights["decoder.embed_tokens.weight"]
    return ModelSource(
        layout="random",
        architecture=recipe.architecture,
        weights=weights,
        dtype="float16",
        eos_token_ids=tuple(tokens[name] for name in recipe.end_of_answer) or (2,),
        image_token_id=tokens.get(recipe.prompt.image_token),
        tokenizer=stand_in_tokenizer(recipe.architecture.decoder.vocab_size, tokens),
        files=(),
    )


def random_text_tower(recipe: Recipe, *, vision_width: int, seed: int) -> TextTowerSource:
    """A text tower of the recipe's sizes.

    Raises:
        UsageError: the recipe says no sizes for it.
    """
    tower = recipe.text_tower
    if tower is None or tower.shape is None:
        raise UsageError(
            f"recipe {recipe.name} does not say the sizes of its text tower",
            seen="--random-weights",
            fix="choose a pruner that reads no text",
        )
    shape = tower.shape
    weights = _draw(expected_text_tensors(shape), seed + 1)
    projection = {"visual_projection.weight": (shape.embed_dim, vision_width)}
    eos = {"</s>": shape.eos_token_id}
    return TextTowerSource(
        tower=tower,
        shape=shape,
        weights=weights,
        visual_projection=_draw(projection, seed + 2)["visual_projection.weight"],
        tokenizer=stand_in_tokenizer(shape.vocab_size, eos, ends_with="</s>"),
        files=(),
    )


def stand_in_tokenizer(
    vocab_size: int, special: Mapping[str, int], *, ends_with: str | None = None
) -> bytes:
    """A tokenizer.json that splits at spaces and knows no word: for lengths, not for meaning.

    Args:
        vocab_size: No id reaches it.
        special: Ids of the special tokens, by their text.
        ends_with: One of them, put at the end of every text; else ``<s>``, if there is one, begins
            every text.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    taken = set(special.values())
    free = (i for i in range(vocab_size) if i not in taken)
    names = ["<unk>", *(f"word{i}" for i in range(min(vocab_size, 1024) - len(taken) - 1))]
    vocabulary = {**dict(zip(names, free, strict=False)), **special}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    frame = f"$A {ends_with}" if ends_with else "<s> $A" if "<s>" in special else "$A"
    used = [(text, token) for text, token in special.items() if text in frame.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False).encode()


def _draw(expected: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Weight]:
    drawn: dict[str, Weight] = {}
    for key, shape in expected.items():
        # Every model calls them so: layer_norm1, q_norm, final_layernorm.
        if "norm" in key and key.endswith("weight"):
            drawn[key] = filled(shape, 1.0, _DTYPE)
        else:
            own_seed = zlib.crc32(key.encode()) ^ seed
            drawn[key] = random_normal(shape, std=_STD, seed=own_seed, dtype=_DTYPE)
    return drawn
