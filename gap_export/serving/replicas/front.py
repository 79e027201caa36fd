"""The front: lets requests in, and hands each to a replica; to another one if that is lost."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from gap_export.serving.asking import until_gone
from gap_export.serving.gate import CLIENT_LEFT, Account, add_gate
from gap_export.serving.metrics import Metrics
from gap_export.serving.options import ApiKeys, ServeOptions
from gap_export.serving.problems import RefusedError
from gap_export.serving.replicas.replica import Call, Reply
from gap_export.serving.waiting import expired

# What of a head goes to a replica; the rest of a scope belongs to this process.
_HEAD = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string")
_log = logging.getLogger(__name__)


def create_front(options: ServeOptions, handle: Any) -> FastAPI:
    """Make the application that stands before replicas.

    Args:
        options: Who is let in, and how many at a time.
        handle: Ray Serve's, of the deployment.

    Raises:
        UsageError: API keys that are missing or cannot be used.
    """
    metrics, front = Metrics(), Front(handle)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    app.mount("/", front)
    add_gate(app, options, ApiKeys.read(options), metrics, front.retry_after)
    return app


class Front:
    """An application of ASGI whose answers are those of replicas."""

    def __init__(self, handle: Any) -> None:
        """Stand before the replicas of a handle."""
        self._handle = handle
        self._newest_seconds = 0.0

    def retry_after(self) -> int:
        """Seconds: what the newest answer took, in line and to run."""
        return max(1, math.ceil(self._newest_seconds))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that has passed the gate.

        Raises:
            RefusedError: its deadline is over; its client left; two replicas were lost with it.
        """
        request, account = Request(scope, receive), Account.of(scope)
        head = {name: scope[name] for name in _HEAD if name in scope}
        head |= {"headers": list(scope["headers"]), "root_path": ""}
        body = await request.body()
        started = time.monotonic()
        work = asyncio.ensure_future(self._ask(head, body, account))
        gone = asyncio.ensure_future(until_gone(request))
        try:
            await asyncio.wait(
                {work, gone},
                timeout=max(account.deadline - started, 0),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not work.done():
                raise RefusedError(CLIENT_LEFT, "the client left") if gone.done() else expired()
            reply = work.result()
        finally:
            work.cancel()
            gone.cancel()
        self._newest_seconds = time.monotonic() - started
        # For the gate's figures and its log.
        scope["route"] = SimpleNamespace(path=reply.route)
        account.about |= reply.about
        await send(reply.head)
        await send({"type": "http.response.body", "body": reply.body})

    async def _ask(self, head: dict[str, Any], body: bytes, account: Account) -> Reply:
        """The answer of a replica; a question changes nothing, so it may be asked twice."""
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        for is_last in (False, True):
            left = account.deadline - time.monotonic()
            call = Call(scope=head, body=body, seconds=left, caller=account.caller)
            response = self._handle.answer.remote(call)
            try:
                reply = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (RayTaskError, TaskCancelledError):
                # An error of ours, not the end of a replica.
                raise
            except RayError as err:
                _log.warning(
                    "a replica was lost with a request",
                    extra={"about": {"error": type(err).__name__, "asked again": not is_last}},
                )
                if is_last:
                    break
                account.about["asked_again"] = True
            else:
                assert isinstance(reply, Reply)
                return reply
        raise RefusedError(
            503,
            "two replicas were lost, one after the other, with this request",
            fix="ask again later",
            headers={"Retry-After": "5"},
        )
