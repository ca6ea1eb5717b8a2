"""The HTTP application: OpenAI's endpoints, passed on to the engine; health, readiness and metrics."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from samq import __version__
from samq.serving.admission import Admission, slots_of
from samq.serving.child import LostError
from samq.serving.engine import ENGINES
from samq.serving.guard import Guard
from samq.serving.limits import read_body
from samq.serving.metrics import Metrics
from samq.serving.proxy import Exchange, receive_body
from samq.serving.refusal import ErrorBody, Refused
from samq.serving.served import Served
from samq.serving.settings import ServingSettings
from samq.serving.source import Source
from samq.serving.warmup import RecentPrompts
from samq.serving.watch import Watcher

# What is passed on, and what it is for. The engine's own management (slots, properties, adapters) is not.
PASSED_ON = {
    "/v1/chat/completions": "Answer the last turn of a conversation.",
    "/v1/chat/completions/input_tokens": "Count the tokens of a conversation.",
    "/v1/completions": "Continue a prompt.",
    "/v1/responses": "Answer in the form of OpenAI's Responses API.",
    "/v1/responses/input_tokens": "Count the tokens of a request of the Responses API.",
    "/v1/messages": "Answer in the form of Anthropic's Messages API.",
    "/v1/messages/count_tokens": "Count the tokens of a conversation.",
    "/v1/embeddings": "Embed texts; needs the engine's flag `embeddings`.",
    "/v1/rerank": "Order documents by a query; needs the engine's flag `reranking`.",
    "/tokenize": "Tokens of a text.",
    "/detokenize": "Text of tokens.",
    "/apply-template": "The prompt that a conversation becomes.",
    "/infill": "Fill in the middle of code.",
}
_ALIASES = {path.removeprefix("/v1"): path for path in PASSED_ON if path.startswith("/v1/")} | {
    **{f"/v1{path}": path for path in ("/tokenize", "/detokenize")},
    **dict.fromkeys(("/v1/reranking", "/reranking"), "/v1/rerank"),
}
_ANSWERING = ("completions", "responses", "messages", "infill")  # ends of the paths at which the model writes
_THREAD_BYTES = 64 * 1024  # a longer body is parsed in a thread,
_COUNTED = (b'"pattern"', b'"grammar"')  # as is one whose matches are counted
_SCRAPE_S = 2.0  # for the engine's metrics: it answers between two batches
_GET = ["GET", "HEAD"]
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "the answer, whole or streamed"},
    400: {"model": ErrorBody, "description": "the request is invalid; the message says why"},
    401: {"model": ErrorBody, "description": "the API key is missing or wrong"},
    404: {"model": ErrorBody, "description": "the server has another model"},
    408: {"model": ErrorBody, "description": "the body came too slowly"},
    413: {"model": ErrorBody, "description": "the body is too long"},
    415: {"model": ErrorBody, "description": "the body is compressed"},
    429: {"model": ErrorBody, "description": "the queue is full; Retry-After says when to try again"},
    501: {"model": ErrorBody, "description": "the engine cannot do this, or needs a flag for it"},
    503: {"model": ErrorBody, "description": "no model is loaded, the engine ended, or the server is shutting down"},
    504: {"model": ErrorBody, "description": "the request took too long"},
}


class Server:
    """The parts of a server. All but its making belongs to the event loop's thread."""

    def __init__(self, source: Source, settings: ServingSettings) -> None:
        """The model is loaded when the application starts."""
        self.settings = settings
        self.metrics = Metrics()
        self.recent = RecentPrompts(settings.shadow.prompts)
        self.admission = Admission(settings.parallel, settings.queue_size, self.metrics)
        self.watcher = Watcher(source, self.admission, settings, self.metrics, self.recent)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, and wait until present ones have ended, at most so long."""
        self.admission.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.admission.idle:
                    await asyncio.sleep(0.02)


def create_app(server: Server) -> FastAPI:
    """The application; its lifespan starts and stops the server's parts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.watcher.start()
        yield
        server.admission.draining = True
        await server.watcher.close()

    app = FastAPI(
        title="SAMQ", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json"
    )
    _add_passed_on(app, server)
    _add_status(app, server)
    _add_errors(app)
    endpoints = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(Guard, keys=server.settings.keys, metrics=server.metrics, endpoints=endpoints)
    if server.settings.cors_origins:  # around the guard: a browser asks without the key whether it may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app


def _add_passed_on(app: FastAPI, server: Server) -> None:
    settings = server.settings

    async def pass_on(request: Request) -> Response:
        body = await receive_body(request, settings)
        serving = server.watcher.serving
        check = (body, settings, serving.vocabulary if serving else ("", ""))
        takes_long = len(body) >= _THREAD_BYTES or any(word in body for word in _COUNTED)
        fields, body = await asyncio.to_thread(read_body, *check) if takes_long else read_body(*check)
        _check_model(server, fields.get("model"))
        path = _ALIASES.get(request.url.path, request.url.path)
        if serving and (added := _for_engine(path, fields, serving, settings)):
            body = to_json({**fields, **added})
        server.recent.add(path, fields)
        streams = fields.get("stream") is True and path.endswith(_ANSWERING)
        slots = slots_of(path, fields, settings.parallel)
        return Exchange(request, path, body, streams, slots, server.admission, server.metrics, settings)

    for path, meaning in PASSED_ON.items():
        app.add_api_route(path, pass_on, methods=["POST"], responses=_ANSWERS, description=meaning, response_model=None)
    for path in _ALIASES:
        app.add_api_route(path, pass_on, methods=["POST"], include_in_schema=False, response_model=None)


def _add_status(app: FastAPI, server: Server) -> None:
    @app.api_route("/v1/models", methods=_GET)
    @app.api_route("/models", methods=_GET, include_in_schema=False)
    async def models() -> dict[str, Any]:
        """The model that the server has."""
        serving = server.watcher.serving
        return {"object": "list", "data": [_listed(server)] if serving else []}

    @app.api_route("/v1/models/{name:path}", methods=_GET, responses={404: _ANSWERS[404]})
    async def model(name: str) -> dict[str, Any]:
        """The model of this name."""
        _check_model(server, name)
        if not server.watcher.serving:
            raise Refused(404, f"this server does not have the model {name}; it has none", code="model_not_found")
        return _listed(server)

    @app.api_route("/health", methods=_GET)
    async def health() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.api_route(
        "/ready", methods=_GET, responses={503: {"description": "no model is loaded, or the server is shutting down"}}
    )
    async def ready() -> JSONResponse:
        """Whether the server answers requests, with which version, and how that was loaded."""
        serving, admission = server.watcher.serving, server.admission
        status = (
            "ready"
            if admission.ready
            else "shutting down"
            if admission.draining
            else "starting"
            if serving
            else "no model"
        )
        body = {"status": status, "problem": server.watcher.problem, **_described(server)}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @app.api_route("/metrics", methods=_GET, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The metrics for Prometheus."""
        serving = server.watcher.serving
        child = serving.child if serving else None
        server.metrics.engine_pid = child.pid if child else None
        text = generate_latest(server.metrics.registry)
        if child and server.settings.engine == "llama-server":
            with suppress(LostError):
                text += (await child.get("/metrics", _SCRAPE_S)).encode()
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        refused = Refused(error.status_code, str(error.detail))
        return JSONResponse(refused.body, refused.status, {**refused.headers, **(error.headers or {})})

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(Refused(500, "the server failed; see its log", code="internal_error").body, 500)


def _for_engine(path: str, fields: dict[str, Any], serving: Served, settings: ServingSettings) -> dict[str, Any]:
    """Fields that the engine needs and the client does not know of: the model's name, and what ends its answers."""
    needed: dict[str, Any] = {}
    if ENGINES[settings.engine].needs_name and not fields.get("model"):
        needed["model"] = serving.gguf.name
    if serving.printed_ends and path.endswith(_ANSWERING):
        name = "stop_sequences" if path == "/v1/messages" else "stop"
        own = fields.get(name) or []
        needed[name] = [*(own if isinstance(own, list) else [own]), *serving.printed_ends]
    return needed


def _check_model(server: Server, name: Any) -> None:
    """Raise Refused if a request asks for another model: an answer by this one would mislead."""
    serving, others = server.watcher.serving, server.settings.model_names
    if name and serving and "*" not in others and name not in (serving.gguf.name, *others):
        raise Refused(
            404,
            f"this server does not have the model {str(name)[:80]}; it has {serving.gguf.name} (see model_names)",
            code="model_not_found",
            param="model",
        )


def _listed(server: Server) -> dict[str, Any]:
    serving = server.watcher.serving
    assert serving
    meta = {"meta": serving.described["meta"]} if "meta" in serving.described else {}
    created = serving.described.get("created", int(time.time()))
    return {"id": serving.gguf.name, "object": "model", "created": created, "owned_by": "samq", **meta}


def _described(server: Server) -> dict[str, Any]:
    serving, settings = server.watcher.serving, server.settings
    if not serving:
        return {}
    gguf = serving.gguf
    return {
        "model": {
            "name": gguf.name,
            "version": gguf.version,
            "alias": gguf.alias,
            "sha256": gguf.sha256,
            "plan": gguf.plan_digest,
        },
        "loading": {
            "engine": settings.engine,
            "slots": settings.parallel,
            "context_tokens": serving.loading.context_tokens,
            "gpu_layers": serving.gpu_layers,
            "kv_type": settings.kv_type,
            "notes": serving.notes,
        },
    }
