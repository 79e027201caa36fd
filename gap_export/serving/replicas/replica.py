"""A replica: the application, asked by calls of Ray in place of a socket."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message

from gap_export.serving.application import create_app
from gap_export.serving.asking import Models
from gap_export.serving.gate import Account
from gap_export.serving.options import ServeSettings


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request of HTTP that the front has let in.

    Attributes:
        scope: Its head, as ASGI has it: plain data alone.
        body: All of it.
        seconds: That are left to answer it.
        caller: Which API key it bore.
    """

    scope: dict[str, Any]
    body: bytes
    seconds: float
    caller: int


@dataclass(kw_only=True)
class Reply:
    """The answer to a call.

    Attributes:
        head: The message of ASGI that begins an answer.
        body: All of it.
        route: Which one answered, for figures and logs.
        about: What a log may say of it.
    """

    head: Message = field(default_factory=dict)
    body: bytes = b""
    route: str = "none"
    about: dict[str, Any] = field(default_factory=dict)


class Replica:
    """The class of the deployment. A replica is there once its models have warmed up."""

    # Ray Serve awaits it.
    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        """Open the bundles on this node.

        Raises:
            GapExportError: one cannot be opened, or not be used.
        """
        self._app = create_app(settings)
        self._models: Models = self._app.state.models
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        for worker in self._models.workers.values():
            await asyncio.to_thread(worker.wait_until_warm)
            if worker.failure is not None:
                raise worker.failure

    async def answer(self, call: Call) -> Reply:
        """Have the application answer; if this is cancelled, its client has left."""
        account = Account(deadline=time.monotonic() + call.seconds, caller=call.caller)
        scope = {**call.scope, "gap_export.account": account}
        reply, unread = Reply(), [call.body]

        async def receive() -> Message:
            if not unread:
                # The client is there as long as this call runs.
                await asyncio.Event().wait()
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.head = dict(message)
            else:
                reply.body += message.get("body", b"")

        await self._app(scope, receive, send)
        reply.route = getattr(scope.get("route"), "path", "none")
        reply.about = account.about
        return reply

    async def __del__(self) -> None:
        """Ray Serve calls this once all calls are answered."""
        if hasattr(self, "_lifespan"):
            await self._lifespan.__aexit__(None, None, None)
