"""The same model for images of another size, where its towers take any."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import replace

from pydantic import ValidationError

from gap_export.errors import UsageError
from gap_export.spec.manifest import BoxSpec, GridSpec
from gap_export.spec.manifest.sizes import image_sizes
from gap_export.spec.recipe import Recipe

_MAX_SHOWN = 300
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


def choose_canvas(recipe: Recipe, canvas: str | None, *, takes_any: bool) -> Recipe:
    """The recipe for what the user asks to be seen.

    Args:
        recipe: As it is shipped.
        canvas: ``WIDTHxHEIGHT`` in pixels, or several with commas; None for the recipe's own.
        takes_any: Whether the model's family does, see ``Family.any_canvas``.

    Raises:
        UsageError: the model takes one size alone, this is none, or not made of whole tokens.
    """
    if canvas is None:
        return recipe
    own = f"{recipe.image.width}x{recipe.image.height}"
    found = [_SIZE.fullmatch(one) for one in canvas[:_MAX_SHOWN].split(",")]
    sizes = [(int(one[2]), int(one[1])) for one in found if one is not None]
    if len(sizes) < len(found):
        raise UsageError(
            "a canvas is width x height in pixels",
            seen=reprlib.repr(canvas),
            allowed=f"such as {own}, or several with commas",
        )
    if not takes_any and sizes != [(recipe.image.height, recipe.image.width)]:
        raise UsageError(
            f"{recipe.name} sees images of one size",
            seen=canvas,
            allowed=own,
            fix="leave out --canvas",
        )
    return _with_canvases(recipe, sizes) if takes_any else recipe


def _with_canvases(recipe: Recipe, sizes: Sequence[tuple[int, int]]) -> Recipe:
    """A recipe for canvases of these (height, width), the first of which images are laid on.

    Raises:
        UsageError: they differ in their number of visual tokens, or the model takes one alone.
    """
    alone = [with_canvas(recipe, *size) for size in dict.fromkeys(sizes)]
    if len(alone) == 1:
        return alone[0]
    numbers = {f"{one.image.width}x{one.image.height}": one.grid.num_visual_tokens for one in alone}
    if len(set(numbers.values())) > 1:
        raise UsageError(
            "canvases of one bundle have as many visual tokens each",
            seen=", ".join(f"{name}: {number}" for name, number in numbers.items()),
            fix="export a bundle for each",
        )
    first, shapes = alone[0], recipe.architecture
    if isinstance(recipe.box.scale, tuple) or (shapes and shapes.vision.window_size is not None):
        raise UsageError(
            f"{recipe.name} takes one canvas a bundle: its windows, and the pixels of its boxes, "
            "are those of one",
            seen=", ".join(numbers),
            fix="export a bundle for each",
        )
    return with_grids(first, tuple((one.grid.rows, one.grid.cols) for one in alone))


def with_grids(recipe: Recipe, grids: tuple[tuple[int, int], ...]) -> Recipe:
    """A recipe that takes several canvases, see ``ImageSpec.grids``; empty for its own alone."""
    architecture = recipe.architecture
    if architecture is not None:
        vision = replace(architecture.vision, grids=grids)
        architecture = replace(architecture, vision=vision)
    image = replace(recipe.image, grids=grids)
    return Recipe(**{**dict(recipe), "image": image, "architecture": architecture})


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
    image = replace(recipe.image, height=height, width=width, grids=())
    for name, seen, most in image_sizes(image, grid):
        if seen > most:
            raise UsageError(f"a canvas is too large: {name}", seen=seen, allowed=f"1..{most}")
    architecture = recipe.architecture
    if architecture is not None:
        vision = replace(architecture.vision, image_size=(height, width), grids=())
        architecture = replace(architecture, vision=vision)
    # Not a copy: the sizes are to fit together as if the recipe had been written so.
    changed = {
        **dict(recipe),
        "image": image,
        "grid": grid,
        "architecture": architecture,
        "box": _on_canvas(recipe, width, height),
    }
    try:
        return Recipe(**changed)
    except ValidationError as err:
        # The recipe itself was checked when it was read.
        raise UsageError(
            "this canvas cannot be used",
            seen=f"{width}x{height}",
            allowed=str(err.errors()[0]["msg"]).removeprefix("Value error, "),
        ) from err


def token_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width in pixels of the place of one visual token."""
    return recipe.image.height // recipe.grid.rows, recipe.image.width // recipe.grid.cols


def _on_canvas(recipe: Recipe, width: int, height: int) -> BoxSpec:
    """Two numbers are pixels of what the vision encoder reads; one is the same for any size.

    But one that is the side of a square canvas is pixels, too.
    """
    box, own = recipe.box, (recipe.image.width, recipe.image.height)
    if not isinstance(box.scale, tuple) and own != (box.scale, box.scale):
        return box
    return replace(box, scale=(float(width), float(height)))
