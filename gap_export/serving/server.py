"""The application behind uvicorn, from a socket to a graceful stop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import uvicorn
from starlette.types import ASGIApp

from gap_export.errors import UsageError
from gap_export.serving.application import create_app
from gap_export.serving.gate import JsonFormatter
from gap_export.serving.options import ApiKeys, ServeSettings
from gap_export.serving.replicas.options import ReplicaOptions
from gap_export.stop_signals import Stopped

_NO_REPLICAS = ReplicaOptions()


def serve(
    settings: ServeSettings,
    replicas: ReplicaOptions = _NO_REPLICAS,
    *,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; what was let in by then is answered.

    Args:
        settings: What is served, and where.
        replicas: Whether the models run in a Ray cluster, and in how many replicas.
        say: Hears where the server listens.

    Raises:
        UsageError: the address cannot be listened at, or what ``create_app`` or ``replicated``
            says.
        GapExportError: a bundle cannot be opened.
    """
    options = settings.options
    # Before the bundles, which take seconds; and nothing listens that nobody may ask.
    ApiKeys.read(options)
    replicas.check(settings)
    with (
        _listen(options.host, options.port) as listener,
        _application(settings, replicas) as app,
    ):
        _log_as_json()
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=int(options.deadline_s) + 1,
            )
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {', '.join(settings.named_bundles())} at http://{shown}:{port}")
        try:
            server.run(sockets=[listener])
        except Stopped:
            # Raised by uvicorn after it has stopped in order.
            say("stopped; all that was let in was answered")


def _application(
    settings: ServeSettings, replicas: ReplicaOptions
) -> AbstractContextManager[ASGIApp]:
    if not replicas.ray:
        return nullcontext(create_app(settings))
    from gap_export.serving.replicas.deployment import replicated

    settings.named_bundles()
    return replicated(settings, replicas)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as err:
        raise UsageError(
            "the server cannot listen there",
            seen=f"{host}, port {port}: {err.strerror or err}",
            fix="choose another --port or --host",
        ) from err


def _log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("gap_export.serving", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
