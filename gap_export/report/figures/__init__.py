"""Plots as SVG: how they look, and how they become part of a page.

Colors are those of the palette of Okabe and Ito (2008), which color-blind people tell apart;
markers and lines differ as well. Every number that is drawn is also in a table.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gap_export.visible import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE = "#B88600"
INK, GRID, _FRAME, _PAGE = "#222222", "#dddddd", "#888888", "#ffffff"
# Width in inches, which is that of the page.
WIDTH = 10.0
STYLE: dict[Any, Any] = {
    # Text as outlines looks the same everywhere; ids come from contents, not from a random number.
    "svg.fonttype": "path",
    "svg.hashsalt": "gap-export",
    # Names may hold dollar signs, which are no formula.
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": _FRAME,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# A page sets these by its reader's preference for light or dark.
_VARIABLES = {
    BLUE: "blue",
    VERMILLION: "vermillion",
    GREEN: "green",
    PURPLE: "purple",
    ORANGE: "orange",
    INK: "ink",
    GRID: "grid",
    _FRAME: "frame",
    _PAGE: "surface",
}
_PIXELS_PER_POINT = 96 / 72
# A figure shrinks to this share of its width where there is less room: letters stay legible.
_SMALLEST = 0.62


def draw_svg(draw: Callable[[Figure], None], *, size: tuple[float, float], mark: str) -> str:
    """Draw a figure as an ``<svg>`` element without declaration.

    Args:
        draw: Fills an empty figure.
        size: Width and height in inches.
        mark: Begins the ids in the figure, so that several fit into one page. The element whose
            text describes it has the id ``{mark}-caption``.

    Returns:
        The element; names in it are outlines of letters.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        for axes in figure.axes:
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(
            stream,
            format="svg",
            # The page shows beside it, where it does not fit, that there is more to the right.
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = stream.getvalue()
    # Comments hold names, which are in the figure and in the table below it.
    element = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}-", element)
    for color, name in _VARIABLES.items():
        element = element.replace(f": {color.lower()}", f": var(--{name}, {color.lower()})")
    width = size[0] * 72 * _PIXELS_PER_POINT
    style = f"max-width:{width:.0f}px;min-width:{_SMALLEST * width:.0f}px"
    return re.sub(
        r'^<svg([^>]*?) width="[0-9.]+pt" height="[^"]*"',
        rf'<svg\1 role="img" aria-labelledby="{mark}-caption" style="{style}"',
        element,
        count=1,
        flags=re.DOTALL,
    )


def drawable(text: str) -> str:
    """Text of letters that the font of a figure has, in one line."""
    return " ".join(clean(text).encode("ascii", "backslashreplace").decode().split())
