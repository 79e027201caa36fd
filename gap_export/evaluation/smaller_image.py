"""The honest rival of pruning: a smaller image, of which nothing is dropped.

A model that takes any size of image can be shown a smaller one, of about as many visual tokens as
pruning keeps. Its tower, which pruning does not shorten, is cheaper, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gap_export.bundle import open_bundle
from gap_export.errors import ExpressionError
from gap_export.evaluation.measure import with_prompt
from gap_export.families import find_family
from gap_export.runtime.backends.backend import graph_components
from gap_export.runtime.prompt import PromptEncoder
from gap_export.spec.canvas import token_size, with_canvas
from gap_export.spec.recipe import Recipe

VISION, PREFILL = "vision", "prefill"
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
    rows, cols = smaller_grid((grid.rows, grid.cols), num_tokens)
    down, across = token_size(recipe)
    return with_canvas(recipe, rows * down, cols * across)


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
    """Rows and columns of the grid with about as many tokens, and about the aspect of a larger one.

    Of the grids that are less than a token off the aspect, on one side or the other, it is the one
    whose number of tokens is nearest; of equals the one whose aspect is, and of equals again the
    smaller one.

    Args:
        grid: Rows and columns of the larger one.
        num_tokens: 1 or more, and no more than those of ``grid``.

    Returns:
        No larger than ``grid`` on either side.
    """
    rows, cols = grid

    def off(found: tuple[int, int]) -> tuple[int, float, int]:
        row, col = found
        stretched = row * cols / (col * rows)
        return abs(row * col - num_tokens), max(stretched, 1 / stretched), row * col

    def is_straight(row: int, col: int) -> bool:
        # In whole numbers: |col - row cols / rows| < 1, or |row - col rows / cols| < 1.
        return abs(col * rows - row * cols) < max(rows, cols)

    grids = ((row, col) for row in range(1, rows + 1) for col in range(1, cols + 1))
    return min((found for found in grids if is_straight(*found)), key=off)
