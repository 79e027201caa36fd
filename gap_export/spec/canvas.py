"""The same model for images of another size, where its towers take any."""

from __future__ import annotations

import re
import reprlib
from dataclasses import replace

from gap_export.errors import UsageError
from gap_export.spec.manifest import BoxSpec, GridSpec
from gap_export.spec.manifest.sizes import image_sizes
from gap_export.spec.recipe import Recipe

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


def choose_canvas(recipe: Recipe, canvas: str | None, *, takes_any: bool) -> Recipe:
    """The recipe for what the user asks to be seen.

    Args:
        recipe: As it is shipped.
        canvas: ``WIDTHxHEIGHT`` in pixels, or None for the recipe's own.
        takes_any: Whether the model's family does, see ``Family.any_canvas``.

    Raises:
        UsageError: the model takes one size alone, this is none, or not made of whole tokens.
    """
    if canvas is None:
        return recipe
    own = f"{recipe.image.width}x{recipe.image.height}"
    found = _SIZE.fullmatch(canvas)
    if found is None:
        raise UsageError(
            "a canvas is width x height in pixels",
            seen=reprlib.repr(canvas),
            allowed=f"such as {own}",
        )
    width, height = map(int, found.groups())
    if not takes_any and (width, height) != (recipe.image.width, recipe.image.height):
        raise UsageError(
            f"{recipe.name} sees images of one size",
            seen=canvas,
            allowed=own,
            fix="leave out --canvas",
        )
    return with_canvas(recipe, height, width) if takes_any else recipe


def with_canvas(recipe: Recipe, height: int, width: int) -> Recipe:
    """A recipe whose vision encoder reads images of this size.

    Args:
        recipe: Of a family whose towers take any size, see ``Family.any_canvas``.
        height: Pixels, a multiple of those of a visual token.
        width: Likewise.

    Raises:
        UsageError: a side is not made of whole visual tokens, or there are too many.
    """
    down, across = token_size(recipe)
    for side, length, token in (("high", height, down), ("wide", width, across)):
        if length <= 0 or length % token:
            near = sorted({max(1, length // token) * token, (length // token + 1) * token})
            raise UsageError(
                f"an image of {recipe.name} is made of visual tokens {across} px wide and "
                f"{down} px high",
                seen=f"{length} px {side}",
                allowed=f"a multiple of {token}, such as {' or '.join(map(str, near))}",
            )
    grid = GridSpec(rows=height // down, cols=width // across)
    image = replace(recipe.image, height=height, width=width)
    for name, seen, most in image_sizes(image, grid):
        if seen > most:
            raise UsageError(f"a canvas is too large: {name}", seen=seen, allowed=f"1..{most}")
    architecture = recipe.architecture
    if architecture is not None:
        vision = replace(architecture.vision, image_size=(height, width))
        architecture = replace(architecture, vision=vision)
    # Not a copy: the sizes are to fit together as if the recipe had been written so.
    return Recipe(
        **{
            **dict(recipe),
            "image": image,
            "grid": grid,
            "architecture": architecture,
            "box": _on_canvas(recipe.box, width, height),
        }
    )


def token_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width in pixels of the place of one visual token."""
    return recipe.image.height // recipe.grid.rows, recipe.image.width // recipe.grid.cols


def _on_canvas(box: BoxSpec, width: int, height: int) -> BoxSpec:
    """Two numbers are pixels of what the vision encoder reads; one is the same for any size."""
    if not isinstance(box.scale, tuple):
        return box
    return replace(box, scale=(float(width), float(height)))
