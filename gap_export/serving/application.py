"""The application: what is at which address."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from gap_export.serving.asking import Models, Question
from gap_export.serving.bodies import (
    PROBLEM_STATUSES,
    GroundAnswer,
    GroundForm,
    GroundRequest,
    described,
    plain_answer,
    read_request,
)
from gap_export.serving.chat import add_chat
from gap_export.serving.gate import add_gate
from gap_export.serving.metrics import Metrics
from gap_export.serving.options import ApiKeys, ServeSettings
from gap_export.serving.page import add_page
from gap_export.serving.problems import handle_errors
from gap_export.serving.worker import ModelWorker
from gap_export.version import __version__


def create_app(settings: ServeSettings) -> FastAPI:
    """Make the application that serves some bundles.

    Its bundles are open when it is made; they warm up meanwhile, and are closed with its lifespan.

    Args:
        settings: Plain data, so that another process can make the same application.

    Raises:
        UsageError: API keys that are missing or cannot be used; bundles of one name.
        GapExportError: a bundle cannot be opened.
    """
    options, keys, metrics = settings.options, ApiKeys.read(settings.options), Metrics()
    models = Models(settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await models.start()
        yield
        await models.close()

    app = FastAPI(
        title="gap-export",
        version=__version__,
        summary="Where is it? Boxes from pruned vision-language models.",
        lifespan=lifespan,
        # They would fetch scripts from another host.
        docs_url=None,
        redoc_url=None,
    )
    app.state.models = models
    handle_errors(app)
    _add_ground(app, models)
    add_chat(app, models)
    _add_probes(app, models)
    add_page(app)
    add_gate(app, options, keys, metrics, models.retry_after)
    return app


def _add_ground(app: FastAPI, models: Models) -> None:
    forms = {"application/json": GroundRequest, "multipart/form-data": GroundForm}

    @app.post(
        "/v1/ground",
        summary="Find objects in an image.",
        response_model=GroundAnswer,
        **described(forms=forms, statuses=PROBLEM_STATUSES),
    )
    async def ground(request: Request) -> Response:
        asked, data = await read_request(request)
        question = Question(
            model=asked.model,
            image=data,
            options=asked.image_options(),
            expressions=asked.expressions,
            positions=asked.positions,
            stream=asked.stream,
            deadline_ms=asked.deadline_ms,
        )
        answer = await models.ask(question, request)
        groundings = [plain_answer(one, kept_tokens=asked.kept_tokens) for one in answer.groundings]
        return JSONResponse(
            {
                "model": answer.model.name,
                "groundings": groundings,
                "timings_ms": answer.timings_ms,
            }
        )


def _add_probes(app: FastAPI, models: Models) -> None:
    created = int(time.time())

    @app.get("/v1/models", summary="The models that can be asked.")
    async def list_models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_describe(worker, created) for worker in models.workers.values()],
        }

    @app.get("/healthz", summary="Whether the server runs.")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether all models have warmed up.")
    async def readyz() -> JSONResponse:
        ready = {name: worker.is_ready for name, worker in models.workers.items()}
        is_ready = all(ready.values())
        return JSONResponse(
            {"status": "ready" if is_ready else "warming up", "models": ready},
            status_code=200 if is_ready else 503,
        )

    @app.get("/metrics", summary="Figures for Prometheus.", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        return Response(models.metrics.text(), media_type="text/plain; version=0.0.4")


def _describe(worker: ModelWorker, created: int) -> dict[str, Any]:
    manifest = worker.manifest
    pruning = manifest.pruning
    return {
        "id": worker.name,
        "object": "model",
        "created": created,
        "owned_by": "gap-export",
        "gap_export": {
            "model": manifest.model.name,
            "summary": manifest.model.summary,
            "pruner": pruning.pruner,
            "positions": pruning.positions,
            "keep_ratio": pruning.keep_ratio,
            "num_visual_tokens": pruning.num_visual_tokens,
            "num_kept_tokens": pruning.num_kept_tokens,
            "ready": worker.is_ready,
        },
    }
