"""Errors as RFC 9457 has them, ``application/problem+json``, in the words of the error itself."""

from __future__ import annotations

from collections.abc import Mapping
from http.client import responses
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from gap_export.errors import (
    GapExportError,
    ImageFormatError,
    ImageSizeError,
    UnknownModelError,
    UsageError,
)
from gap_export.visible import clean

PROBLEM_TYPE = "application/problem+json"
_STATUS: tuple[tuple[type[GapExportError], int], ...] = (
    (UnknownModelError, 404),
    (ImageSizeError, 413),
    (ImageFormatError, 415),
    (UsageError, 422),
    (GapExportError, 500),
)


class RefusedError(GapExportError):
    """What the server itself refuses.

    Attributes:
        status: Of HTTP.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        seen: object | None = None,
        allowed: str | None = None,
        fix: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(what, seen=seen, allowed=allowed, fix=fix)
        self.status = status
        self.headers = headers


def status_of(err: GapExportError) -> int:
    """The HTTP status of an error."""
    if isinstance(err, RefusedError):
        return err.status
    return next(status for kind, status in _STATUS if isinstance(err, kind))


def problem_of(err: GapExportError) -> JSONResponse:
    """An error as an answer."""
    kind = "" if isinstance(err, RefusedError) else type(err).__name__
    parts = {"what": err.what, "seen": err.seen, "allowed": err.allowed, "fix": err.fix}
    return _problem(
        status_of(err),
        str(err),
        kind=kind,
        headers=err.headers if isinstance(err, RefusedError) else None,
        **{name: clean(str(value)) for name, value in parts.items() if value is not None},
    )


def _problem(
    status: int,
    detail: str,
    *,
    kind: str = "",
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    body = {
        "type": f"urn:gap-export:{kind}" if kind else "about:blank",
        "title": responses.get(status, "Client Left"),
        "status": status,
        "detail": clean(detail),
        # Where clients of OpenAI's API look for it.
        "error": {"message": clean(detail), "type": kind or "request", "code": status},
        **more,
    }
    return JSONResponse(body, status, headers=headers, media_type=PROBLEM_TYPE)


def problem_of_bug() -> JSONResponse:
    """What a client may know of an error that is ours."""
    return _problem(500, "a bug in gap-export; the server's log says where")


def problem_of_validation(err: ValidationError | RequestValidationError) -> JSONResponse:
    """What is wrong with a body, field by field; never its content, which may be an image."""
    errors = [
        {"field": ".".join(map(str, one["loc"])), "problem": one["msg"]} for one in err.errors()
    ]
    shown = "; ".join(f"{one['field'] or 'body'}: {one['problem']}" for one in errors[:3])
    return _problem(422, shown, errors=errors[:20])


def handle_errors(app: FastAPI) -> None:
    """Have an application answer errors as problems; the gate answers bugs."""

    async def expected(_: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, GapExportError)
        return problem_of(err)

    async def invalid(_: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, (ValidationError, RequestValidationError))
        return problem_of_validation(err)

    async def http(_: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, HTTPException)
        return _problem(err.status_code, str(err.detail), headers=err.headers)

    app.add_exception_handler(GapExportError, expected)
    app.add_exception_handler(ValidationError, invalid)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
