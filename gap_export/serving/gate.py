"""What every request passes before the application sees it: keys, limits, an account of it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gap_export.errors import GapExportError
from gap_export.serving.metrics import Metrics
from gap_export.serving.options import ApiKeys, ServeOptions
from gap_export.serving.problems import RefusedError, problem_of, problem_of_bug
from gap_export.serving.waiting import expired

# What a probe asks, and the page, which hold nothing of anybody's.
_OPEN = ("/healthz", "/readyz", "/", "/page.css", "/page.js")
# To a client that has left.
CLIENT_LEFT = 499
log = logging.getLogger("gap_export.serving.requests")


@dataclass(kw_only=True)
class Account:
    """What is known of a request, from its head to its log line; ``Account.of`` finds it.

    Attributes:
        deadline: When it must be answered, by ``time.monotonic()``.
        caller: Which API key it bears; -1 where none is asked for.
        about: What a log may say of it: never an image, nor what was looked for.
        status: Of its answer; that of a client that left until there is one.
    """

    deadline: float
    caller: int = -1
    about: dict[str, Any] = field(default_factory=dict)
    status: int = CLIENT_LEFT

    @staticmethod
    def of(scope: Scope) -> Account:
        """The account of a request that has passed the gate."""
        found = scope["gap_export.account"]
        assert isinstance(found, Account)
        return found


class Gate:
    """ASGI middleware: refuses what is not allowed in, and writes down the rest."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        options: ServeOptions,
        keys: ApiKeys,
        metrics: Metrics,
        retry_after: Callable[[], int],
    ) -> None:
        """Stand before an application.

        Args:
            app: What is behind the gate.
            options: What is allowed.
            keys: Who is let in.
            metrics: Counts requests.
            retry_after: Seconds after which it makes sense to ask again.
        """
        self._app, self._options, self._keys = app, options, keys
        self._metrics, self._retry_after = metrics, retry_after
        self._max_body = options.max_body_mib << 20
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        # A replica's front is the gate of what comes with an account.
        is_let_in = "gap_export.account" in scope
        account = Account(deadline=started + self._options.deadline_s)
        account = scope.setdefault("gap_export.account", account)
        headers = Headers(scope=scope)
        request_id = _request_id(headers)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        counts = scope["method"] == "POST"
        self._running += counts
        self._metrics.running.set(self._running)
        try:
            if not is_let_in:
                self._check(scope, headers, account)
            await self._app(scope, self._limited(receive, account), answer)
        except GapExportError as err:
            await problem_of(err)(scope, receive, answer)
        except ClientDisconnect:
            # In the middle of its body: there is nobody to answer.
            account.status = CLIENT_LEFT
        except Exception:
            # Starlette would raise it once more, and uvicorn reset the connection.
            log.exception("a bug", extra={"about": {"request": request_id}})
            if account.status != CLIENT_LEFT:
                raise
            await problem_of_bug()(scope, receive, answer)
        finally:
            self._running -= counts
            self._metrics.running.set(self._running)
            self._write_down(scope, account, request_id, time.monotonic() - started)

    def _check(self, scope: Scope, headers: Headers, account: Account) -> None:
        """Refuse a request by its head.

        Raises:
            RefusedError: another host's name, no right key, too many requests, or too large.
        """
        if self._options.is_local and not self._keys and not _is_local(headers.get("host", "")):
            # A page of another site may have its name resolved to this machine.
            raise RefusedError(
                421,
                "this server answers to names of this machine alone",
                seen=repr(headers.get("host", "")),
                allowed="localhost, or an address of this machine",
            )
        if self._keys and scope["path"].startswith(("/v1/", "/metrics")):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            found = self._keys.find(key.strip())
            if found is None or scheme.lower() != "bearer":
                raise RefusedError(
                    401,
                    "no right API key",
                    fix="send the header Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            account.caller = found
        if scope["method"] != "POST":
            return
        if self._running > self._options.queue:
            raise RefusedError(
                429,
                "too many requests at a time",
                seen=self._running,
                allowed=f"{self._options.queue}",
                headers={"Retry-After": str(self._retry_after())},
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body:
            raise self._too_large()

    def _limited(self, receive: Receive, account: Account) -> Receive:
        """The body as far as it is allowed, and until the deadline."""
        num_bytes, is_whole = 0, False

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            left = account.deadline - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except (TimeoutError, asyncio.TimeoutError):
                raise expired() from None
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > self._max_body:
                raise self._too_large()
            account.about["bytes"] = num_bytes
            return message

        return limited

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            "the body of the request is too large",
            allowed=f"at most {self._options.max_body_mib} MiB",
            fix="make the image smaller first",
            # The rest of it is not read.
            headers={"Connection": "close"},
        )

    def _write_down(self, scope: Scope, account: Account, request_id: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.requests.labels(route, str(account.status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        about = {
            "request": request_id,
            "method": scope["method"],
            "route": route,
            "status": account.status,
            "ms": round(1e3 * seconds, 1),
            **account.about,
        }
        level = logging.DEBUG if route in _OPEN else logging.INFO
        log.log(level, "answered", extra={"about": about})


def add_gate(
    app: Starlette,
    options: ServeOptions,
    keys: ApiKeys,
    metrics: Metrics,
    retry_after: Callable[[], int],
) -> None:
    """Put a gate before an application; pages of other sites may read what options say."""
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    # Added last, it comes first.
    app.add_middleware(Gate, options=options, keys=keys, metrics=metrics, retry_after=retry_after)


class JsonFormatter(logging.Formatter):
    """One line of JSON a record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, as JSON."""
        plain = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "about", {}),
        }
        if record.exc_info:
            plain["trace"] = self.formatException(record.exc_info)
        return json.dumps(plain)


def _request_id(headers: Headers) -> str:
    """The client's own name for a request where it is a harmless one, else a new one."""
    given = headers.get("x-request-id", "")
    is_harmless = 0 < len(given) <= 64 and given.isascii() and given.replace("-", "").isalnum()
    return given if is_harmless else secrets.token_hex(8)


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost"
