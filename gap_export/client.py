"""Asks a server of ``gap-export serve``; the answers are those of a session.

with GroundingClient("http://robot:8000", api_key=key) as client:
    print(client.ground("scene.png", "the small red circle").box)
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from gap_export import errors
from gap_export.errors import GapExportError
from gap_export.extras import require_extra
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.images.files import read_file
from gap_export.runtime.images.image import ColorOrder, ImageFrame

if TYPE_CHECKING:
    import httpx
    from typing_extensions import Self, Unpack

__all__ = ["AsyncGroundingClient", "GroundingClient", "ServerError"]

# A file, the bytes of one, or pixels: uint8 [H, W, 3] or [H, W, 4].
SentImage = str | os.PathLike[str] | bytes | NDArray[np.uint8]
# A client of httpx.
_Http = TypeVar("_Http")


class ServerError(GapExportError):
    """The server could not be reached, or refused a request for a reason of its own.

    Attributes:
        status: Of HTTP, such as 409 for a frame that a newer one of its stream has overtaken; 0
            where there was no answer.
        retry_after: Seconds after which it makes sense to ask again, where the server says so.
    """

    def __init__(
        self,
        what: str,
        *,
        seen: object | None = None,
        allowed: str | None = None,
        fix: str | None = None,
        status: int = 0,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what, seen=seen, allowed=allowed, fix=fix)
        self.status = status
        self.retry_after = retry_after


class AskOptions(TypedDict, total=False):
    """How an image is read and answered.

    Attributes:
        frame: ``upright``: turned as EXIF says; ``raw``: as stored.
        allow_damaged: Use what can be decoded of a damaged image.
        color: Order of an array's channels.
        positions: Position ids to answer with; by default the bundle's own.
        stream: Name of a stream: a frame that waits gives way to a newer one of it.
        deadline_ms: Time until the answer is of no use.
    """

    frame: ImageFrame
    allow_damaged: bool
    color: ColorOrder
    positions: Literal["gap", "compact"]
    stream: str
    deadline_ms: int


class _Client(ABC, Generic[_Http]):
    """What both clients share: the requests that they send, and the answers that they read."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """Know a server; nothing is sent yet.

        Args:
            address: Such as ``http://127.0.0.1:8000``.
            api_key: One of the server's keys, where it asks for one.
            model: Whom to ask; None for the server's first model.
            timeout_s: The longest that an answer is waited for.

        Raises:
            MissingDependencyError: httpx is not installed.
        """
        require_extra("serve", "the client")
        self._model = model
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = self._connect(base_url=address, timeout=timeout_s, headers=headers)

    @abstractmethod
    def _connect(self, **settings: Any) -> _Http:
        """Make httpx's client."""

    def _request(
        self, image: SentImage, expressions: Sequence[str], options: AskOptions
    ) -> dict[str, Any]:
        """What httpx sends: a form."""
        fields: dict[str, Any] = {
            **options,
            "expressions": list(expressions),
            # Without them there would be no Grounding.
            "kept_tokens": "true",
        }
        if self._model is not None:
            fields["model"] = self._model
        if isinstance(image, np.ndarray):
            fields["shape"] = ",".join(map(str, image.shape))
            data = image.tobytes()
        else:
            data = image if isinstance(image, bytes) else read_file(Path(image)).data
        return {"url": "/v1/ground", "data": fields, "files": {"image": ("image", data)}}


class GroundingClient(_Client["httpx.Client"]):
    """Grounds expressions in images on a server; threads may share it.

    Example:
        >>> from gap_export.client import GroundingClient
        >>> with GroundingClient("http://127.0.0.1:8000", model="bundle") as client:
        ...     callable(client.ground)
        True
    """

    def _connect(self, **settings: Any) -> httpx.Client:
        import httpx

        return httpx.Client(**settings)

    def ground(self, image: SentImage, expression: str, **options: Unpack[AskOptions]) -> Grounding:
        """Find one object; see :meth:`ground_batch`."""
        return self.ground_batch(image, [expression], **options)[0]

    def ground_batch(
        self, image: SentImage, expressions: Sequence[str], **options: Unpack[AskOptions]
    ) -> list[Grounding]:
        """Find several objects in one image.

        Args:
            image: A file, the bytes of one, or pixels.
            expressions: What to look for; the answers are in their order.
            options: See :class:`AskOptions`.

        Raises:
            GapExportError: what the server's session says, in its own class and words.
            ServerError: there is no answer, or the server refuses for a reason of its own.
        """
        request = self._request(image, expressions, options)
        try:
            return _groundings(self._http.post(**request))
        except _http_error() as err:
            raise _no_answer(err) from err

    def models(self) -> list[dict[str, Any]]:
        """What the server says of its models.

        Raises:
            ServerError: there is no answer, or a refusal.
        """
        try:
            return _models(self._http.get("/v1/models"))
        except _http_error() as err:
            raise _no_answer(err) from err

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()


class AsyncGroundingClient(_Client["httpx.AsyncClient"]):
    """As :class:`GroundingClient`, for asyncio."""

    def _connect(self, **settings: Any) -> httpx.AsyncClient:
        import httpx

        return httpx.AsyncClient(**settings)

    async def ground(
        self, image: SentImage, expression: str, **options: Unpack[AskOptions]
    ) -> Grounding:
        """Find one object; see :meth:`GroundingClient.ground_batch`."""
        return (await self.ground_batch(image, [expression], **options))[0]

    async def ground_batch(
        self, image: SentImage, expressions: Sequence[str], **options: Unpack[AskOptions]
    ) -> list[Grounding]:
        """Find several objects in one image; see :meth:`GroundingClient.ground_batch`."""
        request = self._request(image, expressions, options)
        try:
            return _groundings(await self._http.post(**request))
        except _http_error() as err:
            raise _no_answer(err) from err

    async def models(self) -> list[dict[str, Any]]:
        """What the server says of its models; see :meth:`GroundingClient.models`."""
        try:
            return _models(await self._http.get("/v1/models"))
        except _http_error() as err:
            raise _no_answer(err) from err

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close it."""
        await self.close()


def _groundings(answer: httpx.Response) -> list[Grounding]:
    return [Grounding.from_plain(plain) for plain in _read(answer)["groundings"]]


def _models(answer: httpx.Response) -> list[dict[str, Any]]:
    return list(_read(answer)["data"])


def _read(answer: httpx.Response) -> dict[str, Any]:
    """An answer's JSON; a problem becomes the error that it was on the server."""
    try:
        plain = answer.json()
    except ValueError:
        plain = {}
    if answer.is_success and plain:
        return dict(plain)
    kind = str(plain.get("type", "")).rpartition(":")[2]
    error = getattr(errors, kind, None)
    what = plain.get("what") or plain.get("detail") or "the server's answer is no JSON"
    parts = {name: plain.get(name) for name in ("seen", "allowed", "fix")}
    if isinstance(error, type) and issubclass(error, GapExportError):
        raise error(what, **parts)
    wait = answer.headers.get("retry-after", "")
    raise ServerError(
        what,
        **parts,
        status=answer.status_code,
        retry_after=float(wait) if wait.isdecimal() else None,
    )


def _http_error() -> type[Exception]:
    import httpx

    return httpx.HTTPError


def _no_answer(err: Exception) -> ServerError:
    return ServerError("the server gave no answer", seen=f"{type(err).__name__} {err}".strip())
