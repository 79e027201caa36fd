"""What sizes come to together: each may be sensible where their product would take a machine down.

Manifests and recipes share these limits. Each is some ten times what the largest models with a use
here have, so that nothing that exists is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from gap_export.spec.manifest.facts import GridSpec, ImageSpec, PromptSpec
from gap_export.spec.manifest.graphs import EngineLimits
from gap_export.spec.manifest.specs import DecoderSpec

# Pixels that a vision encoder reads of one image, its tiles included: 192 MiB as float32.
MAX_INPUT_PIXELS = 1 << 24
# Visual tokens of one image, its tiles included.
MAX_IMAGE_TOKENS = 1 << 18
# Numbers that a cache holds of one token: 2 x layers x heads x dimension; 164 thousand in a 70B
# model with grouped heads, 410 thousand in a 13B one without.
MAX_CACHE_WIDTH = 1 << 22
# Numbers of one row's cache, and of the embeddings of a prompt.
MAX_CACHE_NUMBERS = 1 << 34
MAX_EMBEDDING_NUMBERS = 1 << 30
# Expressions that are asked together, times logits of each.
MAX_LOGITS = 1 << 24

Product = tuple[str, int, int]


def image_sizes(image: ImageSpec, grid: GridSpec) -> Iterator[Product]:
    """What an image comes to: a name, the product, and the most that is allowed."""
    resolutions = () if image.tiles is None else image.tiles.resolutions
    pixels = image.height * image.width
    # The base tile and those of the largest canvas.
    largest = max((height * width for height, width in resolutions), default=0)
    yield "pixels of image.height x image.width and its tiles", pixels + largest, MAX_INPUT_PIXELS
    tiles = 1 + largest // max(1, pixels)
    tokens = tiles * grid.num_visual_tokens
    yield "tokens of grid.rows x grid.cols in all tiles", tokens, MAX_IMAGE_TOKENS


def prompt_sizes(
    image: ImageSpec, grid: GridSpec, prompt: PromptSpec, embeds_size: int
) -> Iterator[Product]:
    """What the embeddings of a prompt come to."""
    slots = _slots(image, grid, prompt)
    yield "slots of a prompt x width of embeddings", slots * embeds_size, MAX_EMBEDDING_NUMBERS


def decoder_sizes(
    image: ImageSpec, grid: GridSpec, prompt: PromptSpec, decoder: DecoderSpec
) -> Iterator[Product]:
    """What a decoder comes to: its cache, the embeddings of a prompt, its logits."""
    width = 2 * decoder.num_layers * decoder.num_key_value_heads * decoder.head_dim
    yield "cache of a token (2 x decoder.num_layers x heads x head_dim)", width, MAX_CACHE_WIDTH
    yield (
        "cache of a prompt and its answer",
        width * _slots(image, grid, prompt),
        MAX_CACHE_NUMBERS,
    )
    yield from prompt_sizes(image, grid, prompt, decoder.embeds_size)
    yield "decoder.vocab_size", decoder.vocab_size, MAX_LOGITS


def engine_sizes(limits: EngineLimits, image: ImageSpec, decoder: DecoderSpec) -> Iterator[Product]:
    """What engines are built for: their largest inputs, caches and logits."""
    width = 2 * decoder.num_layers * decoder.num_key_value_heads * decoder.head_dim
    slots = limits.max_batch * (limits.max_prompt + limits.max_new_tokens)
    yield (
        "pixels of engine_limits.max_images",
        limits.max_images * image.height * image.width,
        16 * MAX_INPUT_PIXELS,
    )
    yield "cache of engine_limits (max_batch x slots)", width * slots, 16 * MAX_CACHE_NUMBERS
    yield "embeddings of engine_limits", slots * decoder.embeds_size, 16 * MAX_EMBEDDING_NUMBERS
    yield "logits of engine_limits", limits.max_batch * decoder.vocab_size, 16 * MAX_LOGITS


def _slots(image: ImageSpec, grid: GridSpec, prompt: PromptSpec) -> int:
    """An upper bound of the tokens of a prompt, nothing pruned, and its answer."""
    _, (_, tokens, _) = image_sizes(image, grid)
    return tokens + prompt.max_expression_tokens + prompt.max_new_tokens
