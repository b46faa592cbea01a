# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The server's endpoints."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from nemo_ee.report.style import shades
from nemo_ee.server.answers.errors import ApiError, ClientGone
from nemo_ee.server.answers.json_response import AsciiResponse
from nemo_ee.server.openapi.document import describe
from nemo_ee.server.requests.api_key import RequiresKey
from nemo_ee.server.requests.hosts import AllowedHosts
from nemo_ee.server.requests.protocol import ChatRequest, CompletionRequest
from nemo_ee.server.service import Service

PAGE = resources.files("nemo_ee.server") / "page.html"
NO_SHADES = "const SHADES = [];"
"""What the page has in the place of colours."""
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
CLIENT_CLOSED = 499
"""Status of an answer that nobody reads."""
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: Service) -> FastAPI:
    """The application; it stops the engine when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequiresKey, key=service.config.api_key)
    app.add_middleware(AllowedHosts, names=service.config.answered_hosts)
    description = AsciiResponse(describe(service.model, service.config))
    page = PAGE.read_text(encoding="utf-8").replace(NO_SHADES, f"const SHADES = {json.dumps(shades(61))};")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.respond(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.respond(request, ChatRequest)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.model.require(name)
        return service.card()

    @app.get("/health")
    async def health() -> Response:
        engine = service.engine
        body = {"status": engine.state, "running": engine.running, "waiting": engine.waiting}
        return AsciiResponse(body, 200 if engine.state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=PROMETHEUS)

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return description

    _handle_errors(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    """Every error is JSON in OpenAI's form."""

    def response(error: ApiError) -> Response:
        return AsciiResponse(error.body(), error.status, error.headers())

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return response(error)

    @app.exception_handler(ClientGone)
    async def client_gone(_: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(HTTPException)
    async def no_such_endpoint(request: Request, error: HTTPException) -> Response:
        body = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body()
        return AsciiResponse(body, error.status_code, error.headers)

    @app.exception_handler(TimeoutError)
    async def late(_: Request, error: TimeoutError) -> Response:
        return response(ApiError.from_failure(error))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return response(ApiError(500, "the server failed; its log says why", code="internal_error"))
