"""Bodies of requests and answers, as the OpenAPI schema has them."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.datastructures import UploadFile

from gap_export.errors import ImageError
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.images.image import ColorOrder, ImageFrame
from gap_export.serving.decoders import ImageOptions
from gap_export.serving.problems import RefusedError
from gap_export.serving.waiting import Positions
from gap_export.visible import clean

Body = TypeVar("Body", bound=BaseModel)

PROBLEM_STATUSES = (400, 401, 404, 409, 413, 415, 421, 422, 429, 500, 503, 504)
MAX_EXPRESSIONS = 64
_MAX_SIDE = 65_535
_MANY = ("expressions",)

Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]


class GroundOptions(BaseModel):
    """What to look for in an image, and how."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[
        str | None, Field(description="Name of a model; by default the server's first.")
    ] = None
    expressions: Annotated[
        list[str],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(min_length=1, max_length=MAX_EXPRESSIONS, description="What to look for."),
    ]
    shape: Annotated[
        tuple[Side, Side, Annotated[int, Field(ge=3, le=4)]] | None,
        BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value),
        Field(
            description="Height, width, channels: the image is pixels of 8 bits a channel, "
            "row by row, and no file. In a form: three numbers with commas."
        ),
    ] = None
    color: Annotated[ColorOrder, Field(description="Order of such pixels' channels.")] = "rgb"
    frame: Annotated[
        ImageFrame, Field(description="upright: turned as EXIF says; raw: as stored.")
    ] = "upright"
    allow_damaged: Annotated[
        bool, Field(description="Use what can be decoded of a damaged image.")
    ] = False
    positions: Annotated[
        Positions | None,
        Field(description="Position ids to answer with; by default the bundle's own."),
    ] = None
    kept_tokens: Annotated[
        bool, Field(description="Answer with token ids, and which visual tokens were kept.")
    ] = False
    stream: Annotated[
        str | None,
        Field(
            max_length=128,
            description="Name of a stream: a frame that waits gives way to a newer one of it.",
        ),
    ] = None
    deadline_ms: Annotated[
        int | None, Field(ge=1, le=3_600_000, description="Time until the answer is of no use.")
    ] = None

    def image_options(self) -> ImageOptions:
        """How the image is to be read."""
        return ImageOptions(
            shape=self.shape,
            color=self.color,
            frame=self.frame,
            allow_damaged=self.allow_damaged,
        )


class GroundRequest(GroundOptions):
    """A request in JSON."""

    image: Annotated[str, Field(description="The image in base64: a file, or pixels.")]


class GroundForm(GroundOptions):
    """A request as a form; ``expressions`` may come several times."""

    image: Annotated[
        str,
        Field(description="The image: a file, or pixels.", json_schema_extra={"format": "binary"}),
    ]


class Answer(BaseModel):
    """Where one object is; see ``gap_export.Grounding``."""

    model_config = ConfigDict(extra="allow")

    expression: str
    box: tuple[float, float, float, float] | None
    text: str
    image_size: tuple[int, int]
    warnings: list[str]
    timings_ms: dict[str, float]


class GroundAnswer(BaseModel):
    """Answers in the order of the expressions."""

    model: str
    groundings: list[Answer]
    timings_ms: Annotated[
        dict[str, float],
        Field(description="Of the request: decode, wait, run, total."),
    ]


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str


def image_key(model: str, data: bytes, options: ImageOptions) -> tuple[object, ...]:
    """What tells an image, and how it is seen, from others."""
    return model, hashlib.blake2b(data, digest_size=16).digest(), options


async def read_request(request: Request) -> tuple[GroundOptions, bytes]:
    """The body of ``/v1/ground``: JSON or a form.

    Raises:
        ValidationError: fields that are missing, unknown or wrong.
        ImageError: an image that is not base64, or not as many pixels as its shape says.
        RefusedError: another kind of body.
    """
    found: GroundOptions
    if _kind_of(request) == "multipart/form-data":
        async with request.form(max_files=1, max_fields=MAX_EXPRESSIONS + 16) as form:
            plain: dict[str, Any] = {
                name: form.getlist(name) if name in _MANY else form[name] for name in form
            }
            upload = plain.pop("image", None)
            data = await upload.read() if isinstance(upload, UploadFile) else b""
        if not isinstance(upload, UploadFile):
            raise ImageError("the form holds no image", allowed="a file in the field image")
        found = GroundOptions.model_validate(plain)
    else:
        found = sent = await read_json(request, GroundRequest)
        data = decode_base64(sent.image)
    if not data:
        raise ImageError("the image is empty")
    if found.shape is not None and len(data) != found.shape[0] * found.shape[1] * found.shape[2]:
        raise ImageError(
            "the image has another number of bytes than its shape says",
            seen=f"{len(data)} bytes for {list(found.shape)}",
        )
    return found, data


async def read_json(request: Request, kind: type[Body]) -> Body:
    """A body of JSON.

    Raises:
        ValidationError: no JSON, or fields that are missing, unknown or wrong.
        RefusedError: another kind of body.
    """
    if _kind_of(request) != "application/json":
        raise RefusedError(
            415,
            "a body of this kind is not read",
            seen=repr(clean(_kind_of(request))),
            allowed="application/json; of /v1/ground also multipart/form-data",
        )
    return kind.model_validate_json(await request.body())


def _kind_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def decode_base64(text: str) -> bytes:
    """Bytes of base64, which must be nothing else.

    Raises:
        ImageError: it is.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise ImageError("the image is not base64", seen=err) from err


def plain_answer(grounding: Grounding, *, kept_tokens: bool) -> Mapping[str, Any]:
    """A grounding as JSON knows it, without what was not asked for."""
    plain = grounding.to_plain()
    if not kept_tokens:
        for name in ("token_ids", "keep_indices", "tokens"):
            del plain[name]
    return plain


def described(*, forms: Mapping[str, type[BaseModel]], statuses: tuple[int, ...]) -> dict[str, Any]:
    """What OpenAPI is told of a route whose body is read by hand.

    Args:
        forms: Media types of the body.
        statuses: Of problems that it answers.
    """
    content = {
        media: {"schema": model.model_json_schema(ref_template="#/$defs/{model}")}
        for media, model in forms.items()
    }
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": described_problems(*statuses),
    }


def described_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI is told of the problems that a route answers, by their statuses."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": "Problem", "content": content} for status in statuses}
