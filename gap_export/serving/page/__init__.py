"""The page at ``/``: three files as they are, and images to try it with."""

from __future__ import annotations

import base64
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import fastapi
from fastapi import FastAPI
from fastapi.responses import FileResponse
from PIL import Image
from pydantic import BaseModel, Field

from gap_export.evaluation.refshapes import EXPRESSIONS_PER_IMAGE, generate_scene
from gap_export.serving.bodies import described_problems

# Only what the page itself brings runs in it, and it asks this server alone. Its icon is data.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Another version of the server has other files of the same names.
    "Cache-Control": "no-cache",
}
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_FOLDER = Path(__file__).parent
_NUM_EXAMPLES = 10_000


class Example(BaseModel):
    """A held-out scene of RefShapes, with questions and their true answers."""

    image: Annotated[str, Field(description="A PNG file in base64.")]
    expressions: list[str]
    boxes: Annotated[
        list[list[int]],
        Field(description="The true box (x1, y1, x2, y2) of each expression, in pixels."),
    ]


def add_page(app: FastAPI) -> None:
    """Add the page's files and ``/v1/examples`` to an application."""
    for path, (name, media_type) in FILES.items():
        app.add_api_route(path, _sender(_FOLDER / name, media_type), include_in_schema=False)

    @app.get(
        "/v1/examples/{index}",
        summary="An image to try the page with.",
        responses=described_problems(401, 421, 422),
    )
    def example(
        index: Annotated[int, fastapi.Path(ge=0, lt=_NUM_EXAMPLES)],
    ) -> Example:
        scene = generate_scene(
            split="heldout", seed=0, index=index, num_expressions=EXPRESSIONS_PER_IMAGE
        )
        png = io.BytesIO()
        Image.fromarray(scene.image).save(png, "png")
        return Example(
            image=base64.b64encode(png.getvalue()).decode(),
            expressions=[one.text for one in scene.expressions],
            boxes=[list(scene.objects[one.target].box) for one in scene.expressions],
        )


def _sender(path: Path, media_type: str) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(path, media_type=media_type, headers=HEADERS)

    return send
