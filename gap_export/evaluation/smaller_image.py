"""The honest rival of pruning: a smaller image, of which nothing is dropped.

A model that takes any size of image can be shown a smaller one, of about as many visual tokens as
pruning keeps. Its tower, which pruning does not shorten, is cheaper, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

from gap_export.bundle import open_bundle
from gap_export.errors import ExpressionError
from gap_export.evaluation.measure import with_prompt
from gap_export.families import find_family
from gap_export.runtime.backends.backend import graph_components
from gap_export.runtime.prompt import PromptEncoder
from gap_export.spec.canvas import token_size, with_canvas, with_grids
from gap_export.spec.recipe import Recipe

VISION, PREFILL = "vision", "prefill"
# By which share the number of tokens may be another where several canvases must have the same.
_NEAR = 0.1
_STAGES = {"vision_encoder": VISION, "token_pruner": VISION, "decoder_model_merged": PREFILL}


def smaller_recipe(recipe: Recipe, num_tokens: int) -> Recipe | None:
    """The model for a smaller image, of about as many visual tokens as pruning keeps.

    A family that declares a canvas gets a smaller one. Of an image that is cut into tiles beside a
    thumbnail, the thumbnail alone is what is smaller.

    Args:
        recipe: Of the whole image.
        num_tokens: Emitted ones of a pruned image.

    Returns:
        None where there is no smaller image, or the model takes none.
    """
    image, grid = recipe.image, recipe.grid
    if image.tiles is not None:
        if image.has_newlines:
            return None
        squashed = replace(image, preparation="squash", tiles=None)
        return recipe.model_copy(update={"image": squashed})
    if not find_family(recipe).any_canvas or num_tokens >= grid.num_visual_tokens:
        return None
    # Of several canvases each has a smaller one: an image is to keep its aspect here as well.
    found = tuple(
        dict.fromkeys(smaller_grids(image.grids or ((grid.rows, grid.cols),), num_tokens))
    )
    down, across = token_size(recipe)
    first = with_canvas(recipe, found[0][0] * down, found[0][1] * across)
    return with_grids(first, found) if len(found) > 1 else first


def count_stages(bundle: Path, *, num_images: float, prompt_length: float) -> dict[str, int]:
    """Multiply-adds of one expression until its answer begins, by stage.

    Args:
        bundle: Whose graphs are counted.
        num_images: Images that the vision encoder sees, the tiles of one: their mean number.
        prompt_length: Tokens of the prompt, visual ones included: their mean number.
    """
    # Evaluating a bundle that is there needs no export package but here.
    import onnx_ir as ir

    from gap_export.graph.multiply_adds import count_multiply_adds

    opened = open_bundle(bundle)
    found = {VISION: 0, PREFILL: 0}
    for component in graph_components(opened.manifest):
        stage = _STAGES.get(component)
        if stage is None:
            continue
        nodes = ir.load(opened.file(opened.manifest.graph(component).file)).graph
        if stage == PREFILL:
            found[stage] += count_multiply_adds(nodes, length=round(prompt_length))
        else:
            found[stage] += round(num_images * count_multiply_adds(nodes))
    return found


def mean_text_length(bundle: Path, expressions: Iterable[str], prompt: str | None) -> float:
    """Tokens of a prompt that are no visual ones, on average of those that can be asked.

    Args:
        bundle: Whose tokenizer reads them.
        expressions: At least one that can be asked.
        prompt: A template in place of the bundle's.
    """
    opened = open_bundle(bundle)
    encoder = PromptEncoder(with_prompt(opened.manifest, prompt), opened.path)
    lengths = []
    for expression in expressions:
        # Those that a model refuses are reported where they are asked.
        with suppress(ExpressionError):
            encoded = encoder.encode(expression)
            lengths.append(len(encoded.prefix_ids) + len(encoded.suffix_ids))
    return sum(lengths) / len(lengths) if lengths else 0.0


def smaller_grid(grid: tuple[int, int], num_tokens: int) -> tuple[int, int]:
    """As :func:`smaller_grids`, of one."""
    return smaller_grids((grid,), num_tokens)[0]


def smaller_grids(grids: Sequence[tuple[int, int]], num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Of each grid one with about as many tokens and about the same aspect; as many in all of them.

    Of the grids that are less than a token off the aspect, on one side or the other, it is the one
    whose number of tokens is nearest; of equals the one whose aspect is, and of equals again the
    smaller one. Several may have no such number in common that is near: then they may be two tokens
    off, or as many as it takes.

    Args:
        grids: Rows and columns of the larger ones.
        num_tokens: 1 or more, and no more than those of any of ``grids``.

    Returns:
        For each of ``grids`` one that is no larger on either side.
    """

    def off(number: int) -> tuple[int, float, int]:
        return abs(number - num_tokens), max(found[number][0] for found in choices), number

    for slack in range(1, max(map(max, grids)) + 1):
        choices = [_grids_of_aspect(*grid, slack) for grid in grids]
        # A single token is of any aspect.
        number = min(set.intersection(*map(set, choices)), key=off)
        if len(grids) == 1 or abs(number - num_tokens) <= num_tokens * _NEAR:
            break
    return tuple(found[number][1] for found in choices)


def _grids_of_aspect(rows: int, cols: int, slack: int) -> dict[int, tuple[float, tuple[int, int]]]:
    """By number of tokens, how far the aspect is off, and the grid where that is least.

    Only grids that are less than ``slack`` tokens off it on one side or the other.
    """
    found: dict[int, tuple[float, tuple[int, int]]] = {}
    for row, col in product(range(1, rows + 1), range(1, cols + 1)):
        # In whole numbers: |col - row cols / rows| < slack, or |row - col rows / cols| < slack.
        if abs(col * rows - row * cols) < slack * max(rows, cols):
            stretched = row * cols / (col * rows)
            one = max(stretched, 1 / stretched), (row, col)
            found[row * col] = min(found.get(row * col, one), one)
    return found
