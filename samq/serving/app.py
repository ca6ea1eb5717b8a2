"""The HTTP application: OpenAI's endpoints over the engine, health, readiness and metrics."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from samq import __version__
from samq.errors import TextError
from samq.llamacpp.chat import ChatError
from samq.serving.answers import ChatShape, CompletionShape
from samq.serving.engine import Engine, Work
from samq.serving.metrics import Metrics
from samq.serving.middleware import RequestGuard
from samq.serving.model import ServedModel
from samq.serving.protocol import ChatRequest, CompletionRequest
from samq.serving.refusal import ErrorBody, Refused
from samq.serving.settings import ServingSettings
from samq.serving.shadow import RecentPrompts
from samq.serving.source import Source
from samq.serving.streams import Exchange
from samq.serving.watch import Watcher

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "the answer, whole or streamed"},
    400: {"model": ErrorBody, "description": "the request is invalid; the message says why"},
    401: {"model": ErrorBody, "description": "the API key is missing or wrong"},
    404: {"model": ErrorBody, "description": "the server has another model"},
    413: {"model": ErrorBody, "description": "the body is too long"},
    429: {"model": ErrorBody, "description": "the queue is full; Retry-After says when to try again"},
    503: {"model": ErrorBody, "description": "no model is loaded, or the server is shutting down"},
    504: {"model": ErrorBody, "description": "the request took too long"},
}


class Server:
    """The parts of a server."""

    def __init__(self, source: Source, settings: ServingSettings) -> None:
        """The worker starts at once; the model is loaded when the application starts."""
        self.settings = settings
        self.metrics = Metrics()
        self.recent = RecentPrompts(settings.shadow.prompts)
        self.closed = False
        self.engine = Engine(settings.queue_size, self.metrics)
        self.watcher = Watcher(source, self.engine, settings, self.metrics, self.recent)

    def close(self) -> None:
        """Stop following the source, give up unfinished requests, and free the model.

        If a thread does not end in time, `closed` stays False, and the caller must end the process.
        """
        self.engine.drain(0)
        self.closed = self.watcher.stop() and self.engine.close()


class _App(FastAPI):
    """An application whose OpenAPI description has no 422: FastAPI adds it, but no request gets it."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description."""
        description = super().openapi()
        for operations in description["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return description


def create_app(server: Server) -> FastAPI:
    """The application; its lifespan starts and stops the server's parts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.watcher.start()
        yield
        server.close()

    app = _App(
        title="SAMQ", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json"
    )
    _add_completions(app, server)
    _add_status(app, server)
    _add_errors(app)
    key = server.settings.api_key
    app.add_middleware(
        RequestGuard,
        api_key=key.get_secret_value() if key else None,
        max_body_bytes=server.settings.max_body_bytes,
        requests=server.metrics.requests,
        endpoints=frozenset(route.path for route in app.routes if hasattr(route, "path")),
    )
    return app


def _add_completions(app: FastAPI, server: Server) -> None:
    engine, timeout_s = server.engine, server.settings.request_timeout_s

    @app.post("/v1/completions", responses=_ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Continue a prompt."""
        exchange = Exchange(engine, request, timeout_s)
        _check_model(engine, body.model)
        engine.check_room()
        work = await asyncio.to_thread(_work, body, _tokenize_prompt(body), body.max_tokens, body.logprobs)
        server.recent.add(work.tokenize)
        return await exchange.answer(
            work,
            lambda model: CompletionShape(model, body.logprobs is not None),
            stream=body.stream,
            usage=body.includes_usage,
        )

    @app.post("/v1/chat/completions", responses=_ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer the last turn of a conversation."""
        exchange = Exchange(engine, request, timeout_s)
        _check_model(engine, body.model)
        engine.check_room()
        alternatives = (body.top_logprobs or 0) if body.logprobs else None
        work = await asyncio.to_thread(_work, body, _tokenize_chat(body), body.limit, alternatives)
        server.recent.add(work.tokenize)
        return await exchange.answer(
            work, lambda model: ChatShape(model, body.logprobs), stream=body.stream, usage=body.includes_usage
        )


def _add_status(app: FastAPI, server: Server) -> None:
    engine = server.engine

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The model that the server has."""
        model = engine.model
        data = [{"id": model.gguf.name, "object": "model", "created": 0, "owned_by": "samq"}] if model else []
        return {"object": "list", "data": data}

    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "no model is loaded, or the server is shutting down"}})
    def ready() -> JSONResponse:
        """Whether the server answers requests, with which model, and how that model was loaded."""
        model = engine.model
        status = "shutting down" if engine.draining else "ready" if model else "no model"
        body = {"status": status, "problem": server.watcher.problem, **(_describe(model) if model else {})}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """The metrics for Prometheus."""
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    def answer(refused: Refused) -> JSONResponse:
        return JSONResponse(refused.body, refused.status, refused.headers)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return answer(
                Refused(400, f"the body is not JSON: {first['ctx']['error']} at byte {where}", code="invalid_json")
            )
        message = f"{where}: {first['msg']}" if where else f"the body: {first['msg']}; send a JSON object"
        return answer(Refused(400, message, code=first["type"], param=where or None))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        response = answer(Refused(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return answer(Refused(500, "the server failed; see its log", code="internal_error"))


def _check_model(engine: Engine, name: str | None) -> None:
    model = engine.model
    if name is not None and model and name != model.gguf.name:
        raise Refused(
            404,
            f"this server does not have the model {name}; it has {model.gguf.name}",
            code="model_not_found",
            param="model",
        )


def _work(
    body: CompletionRequest | ChatRequest,
    tokenize: Callable[[ServedModel], list[int]],
    max_tokens: int | None,
    logprobs: int | None,
) -> Work:
    """Runs in a thread, since making a schema's grammar can take a second."""
    return Work(
        tokenize=tokenize,
        sampling=body.sampling(random.getrandbits(32)),
        max_tokens=max_tokens,
        stops=body.stops,
        logprobs=logprobs,
    )


def _tokenize_prompt(body: CompletionRequest) -> Callable[[ServedModel], list[int]]:
    prompt = body.prompt

    def tokenize(model: ServedModel) -> list[int]:
        texts = [prompt] if isinstance(prompt, str) else [part for part in prompt if isinstance(part, str)]
        if texts:
            return _tokens_of(lambda: model.tokenize(texts[0]), "prompt")
        tokens = [part for part in prompt if isinstance(part, int)]
        wrong = next((token for token in tokens if not 0 <= token < model.model.vocab_size), None)
        if wrong is not None:
            raise Refused(
                400,
                f"{wrong} is not a token: the vocabulary has {model.model.vocab_size} tokens, from 0 on",
                code="invalid_token",
                param="prompt",
            )
        return tokens

    return tokenize


def _tokenize_chat(body: ChatRequest) -> Callable[[ServedModel], list[int]]:
    turns = [message.turn for message in body.messages]

    def tokenize(model: ServedModel) -> list[int]:
        if model.model.chat_template is None:
            reason = f"{model.gguf.name} has no chat template; send a prompt to /v1/completions"
            raise Refused(400, reason, code="no_chat_template")
        return _tokens_of(lambda: model.tokenize_chat(turns), "messages")

    return tokenize


def _tokens_of(tokenize: Callable[[], list[int]], param: str) -> list[int]:
    """The tokens of a text or a chat; raises Refused if the chat template or llama.cpp cannot take it."""
    try:
        return tokenize()
    except ChatError as error:
        raise Refused(
            400, f"the model's chat template {error.reason}; change the messages", code="invalid_messages", param=param
        ) from error
    except TextError as error:
        raise Refused(400, str(error), code="invalid_text", param=param) from error


def _describe(model: ServedModel) -> dict[str, Any]:
    gguf, loading = model.gguf, model.loading
    return {
        "model": {
            "name": gguf.name,
            "version": gguf.version,
            "alias": gguf.alias,
            "sha256": gguf.sha256,
            "plan": gguf.plan_digest,
        },
        "loading": {
            "context_tokens": loading.context_tokens,
            "gpu_layers": loading.gpu_layers,
            "kv_type": loading.kv_type,
            "notes": list(loading.notes),
        },
    }
