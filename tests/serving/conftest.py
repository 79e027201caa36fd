"""A server of the tiny model that all tests of serving ask, over a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from gap_export.runtime.session import GroundingSession
from gap_export.serving.application import create_app
from gap_export.serving.asking import Models
from gap_export.serving.options import ServeOptions, ServeSettings
from gap_export.serving.worker import ModelWorker

LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running server."""

    url: str
    models: Models

    @property
    def worker(self) -> ModelWorker:
        """Of its first model."""
        return next(iter(self.models.workers.values()))

    def http(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=LIMIT_S)


@contextmanager
def running(*bundles: Path, **options: object) -> Iterator[Served]:
    app = create_app(ServeSettings(bundles=bundles, options=ServeOptions(**options)))
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            served = Served(
                url=f"http://127.0.0.1:{listener.getsockname()[1]}", models=app.state.models
            )
            assert served.worker._is_warm.wait(LIMIT_S)
            yield served
        finally:
            server.should_exit = True
            thread.join(LIMIT_S)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(tiny_bundle: Path) -> Iterator[Served]:
    with running(tiny_bundle, queue=8, deadline_s=LIMIT_S) as one:
        yield one


@pytest.fixture(scope="session")
def session(tiny_bundle: Path) -> Iterator[GroundingSession]:
    with GroundingSession.open(tiny_bundle) as one:
        yield one


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)


@pytest.fixture
def held(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """The model answers when it is let."""
    one = Held(served.worker, monkeypatch)
    yield one
    one.go.set()


class Held:
    """Stops a worker before each run.

    Attributes:
        runs: The expressions of each run, in their order.
        begun: Is set when a run begins.
        go: Lets runs go on.
    """

    def __init__(self, worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[list[str]] = []
        self.worker = worker
        self.begun, self.go = threading.Event(), threading.Event()
        ground = worker._ground

        def wait(first, expressions):
            self.runs.append(list(expressions))
            self.begun.set()
            assert self.go.wait(LIMIT_S)
            return ground(first, expressions)

        monkeypatch.setattr(worker, "_ground", wait)
