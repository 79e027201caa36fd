"""What is to be known of a model before it is exported: its sizes, and what each way costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gap_export.checkpoint.find.source import Checkpoint, resolve_model
from gap_export.errors import CheckpointError, UsageError
from gap_export.exporting.quantization import linear_keys
from gap_export.families import (
    Reference,
    build_reference,
    find_family,
    on_canvas,
    resolve_pruning,
)
from gap_export.planning.counting import (
    Cost,
    count_component,
    decode_sizes,
    prefill_sizes,
    weight_sizes,
)
from gap_export.planning.estimate import Weights
from gap_export.planning.results import DECODE, PREFILL, TOWER
from gap_export.spec.canvas import token_size
from gap_export.spec.manifest import PruningSpec
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest

DECODER = "decoder_model_merged"
# Tokens of an expression, and tokens a word of English; where there is no tokenizer to ask.
_EXPRESSION, _TOKENS_A_WORD = "the red cup on the left", 1.3
# Smaller canvases that are looked at where a model takes any: shares of the side.
_CANVASES = (1.0, 0.75, 0.5)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a pruned model does for one answer.

    Attributes:
        pruning: How it is pruned.
        canvas: Width and height in pixels.
        visual_tokens: Tokens that the decoder reads of the image.
        prompt_tokens: Those and the text.
        costs: By stage.
        reference: Its modules, without numbers.
    """

    pruning: PruningSpec
    canvas: tuple[int, int]
    visual_tokens: int
    prompt_tokens: int
    costs: Mapping[str, Cost]
    reference: Reference


class PlannedModel:
    """A model whose sizes are known.

    Args:
        model: As an export takes it.
        recipe: Recipe that a checkpoint folder follows.
        answer_tokens: Tokens of an answer.
        text_tokens: Tokens of a prompt beside the visual ones; None: of the recipe's template.
        prompt_tokens: Of the whole prompt, where that is known.
    """

    def __init__(
        self,
        model: str,
        *,
        recipe: str | None = None,
        answer_tokens: int,
        text_tokens: int | None = None,
        prompt_tokens: int | None = None,
    ) -> None:
        self.recipe, self.checkpoint = find_sizes(model, recipe)
        self.answer_tokens = answer_tokens
        self._text_tokens = text_tokens
        self._prompt_tokens = prompt_tokens
        self._language: dict[tuple[str, int], Cost] = {}

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt beside the visual ones, by the words of the recipe's template."""
        if self._text_tokens is not None:
            return self._text_tokens
        prompt = self.recipe.prompt
        text = prompt.template.replace(prompt.image_token, " ")
        return math.ceil(_TOKENS_A_WORD * len(text.format(expression=_EXPRESSION).split()))

    def canvases(self) -> tuple[str, ...]:
        """The recipe's own and, where the model takes any, smaller ones of its form."""
        image = self.recipe.image
        if not find_family(self.recipe).any_canvas:
            return (f"{image.width}x{image.height}",)
        down, across = token_size(self.recipe)
        sizes = (
            (max(across, across * round(share * image.width / across)),
             max(down, down * round(share * image.height / down)))
            for share in _CANVASES
        )  # fmt: skip
        return tuple(dict.fromkeys(f"{width}x{height}" for width, height in sizes))

    def work(self, request: PruningRequest) -> Work:
        """What a request comes to.

        Raises:
            UsageError: the model cannot be pruned so, or takes no such canvas.
        """
        recipe = on_canvas(self.recipe, request.canvas)
        pruning = resolve_pruning(recipe, replace(request, canvas=None))
        reference = build_reference(recipe, self.checkpoint, pruning, device="meta")
        num_images = 1 + _most_tiles(recipe)
        visual = pruning.num_emitted_tokens * num_images
        prompt = self._prompt_tokens or visual + self.text_tokens
        tower = Cost()
        for component in reference.components:
            if component.name in ("vision_encoder", "token_pruner", "text_encoder"):
                sizes = {
                    "num_images": num_images,
                    "batch_size": 1,
                    "text_length": self.text_tokens,
                    "num_kept_tokens": pruning.num_kept_tokens,
                }
                found = count_component(component, sizes)
                tower.products += found.products
                tower.num_operators += found.num_operators
                tower.largest = max(tower.largest, found.largest)
        return Work(
            pruning=pruning,
            canvas=(recipe.image.width, recipe.image.height),
            visual_tokens=visual,
            prompt_tokens=prompt,
            costs={
                TOWER: tower,
                PREFILL: self._language_cost(reference, PREFILL, prompt),
                DECODE: self._language_cost(reference, DECODE, prompt + self.answer_tokens // 2),
            },
            reference=reference,
        )

    def _language_cost(self, reference: Reference, stage: str, num_tokens: int) -> Cost:
        key = stage, num_tokens
        if key not in self._language:
            sizes = prefill_sizes(num_tokens) if stage == PREFILL else decode_sizes(num_tokens)
            self._language[key] = count_component(reference.component(DECODER), sizes)
        return self._language[key]


def weights_of(work: Work, dtype: str, floats: str) -> Weights:
    """How the weights are held where ``--dtype`` is this one and floats are that one."""
    decoder = work.reference.component(DECODER)
    return Weights(
        dtype=dtype,
        floats=floats,
        packed=frozenset(linear_keys(decoder, lm_head=False)) if dtype == "int4" else frozenset(),
        sizes={one.name: weight_sizes(one) for one in work.reference.components},
    )


def cache_bytes_a_token(work: Work) -> dict[str, int]:
    """Of keys and values of one token, by dtype."""
    spec = work.reference.decoder_spec
    numbers = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_dim
    return {"float32": 4 * numbers, "float16": 2 * numbers, "bfloat16": 2 * numbers}


def find_sizes(model: str, recipe: str | None) -> tuple[Recipe, Checkpoint]:
    """A recipe that says its sizes needs no checkpoint; of any other one its checkpoint is read.

    Raises:
        UnknownModelError: no such model.
        UsageError: the sizes are in the checkpoint alone, and that is not here.
    """
    found, nothing = resolve_model(model, recipe=recipe, random_seed=0)
    if found.architecture is not None:
        return found, nothing
    try:
        found, here = resolve_model(model, recipe=recipe)
    except CheckpointError as err:
        raise UsageError(
            f"the sizes of {found.name} are in its checkpoint alone, which is not here",
            seen=err.seen or err.what,
            allowed="a checkpoint on this machine, or a recipe with 'architecture'",
            fix="download it, or add its sizes to a recipe of your own: --recipe",
        ) from err
    return found, here


def _most_tiles(recipe: Recipe) -> int:
    """Tiles of an image beside the image as a whole."""
    image = recipe.image
    if image.tiles is None:
        return 0
    area = image.height * image.width
    return max(height * width // area for height, width in image.tiles.resolutions)
