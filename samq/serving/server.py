"""Runs the application: the socket, limits of connections and heads, and a shutdown that lets requests finish."""

import asyncio
import logging
import os
import resource
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from samq.serving.app import Server, create_app
from samq.serving.engine import require_flags
from samq.serving.proxy import BEGAN
from samq.serving.settings import ServingSettings
from samq.serving.source import Source

logger = logging.getLogger(__name__)

_LAST_BYTES_S = 5  # time for finished answers to reach their clients
_LAST_THREADS_S = 5.0  # and for everything after that; then the process ends, whatever a thread does
# By default MLflow's client retries for 4 minutes if its server is down. These settings limit a lookup, two requests, to
# 15 s; the watcher looks again soon enough. Variables that the environment already has stay as they are.
_MLFLOW = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}


def serve(source: Source, settings: ServingSettings) -> None:
    """Serve until SIGTERM or Ctrl-C. Present requests then have `drain_timeout_s` to finish, and new ones get 503.

    Raises SamqError if the engine is missing, or does not know a flag. Ends the process when all is done, whatever its
    threads do; the engines end with it.
    """
    require_flags(settings)
    for name, value in _MLFLOW.items():
        os.environ.setdefault(name, value)
    _allow_files(2 * settings.max_connections + 256)  # a client's connection, and the engine's for it
    server = Server(source, settings)
    _DrainingServer(uvicorn_config(server), server).run()
    logging.shutdown()
    os._exit(0)  # a thread may wait for MLflow for minutes


def uvicorn_config(server: Server) -> uvicorn.Config:
    """How uvicorn serves the application."""
    settings = server.settings

    class Protocol(GateProtocol):
        limits = settings

    return uvicorn.Config(
        create_app(server),
        host=settings.host,
        port=settings.port,
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=_LAST_BYTES_S,
        backlog=1024,
    )


class GateProtocol(HttpToolsProtocol):
    """Uvicorn's connection with a time limit for each request's head, and a limit of connections."""

    limits: ServingSettings

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin with the head of the first request, unless there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
        else:
            # A client that does not read would keep its connection, and what waits for it, for ever.
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self.limits.request_timeout_s)
            )
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Begin with the head of the next request, when its first byte comes."""
        super().data_received(data)
        between = self.cycle is None or self.cycle.response_complete
        if between and self._head is None and not self.transport.is_closing():
            self._await_head()

    def on_message_begin(self) -> None:
        """The deadline of a request counts from here."""
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[BEGAN] = self.loop.time()

    def on_headers_complete(self) -> None:
        """The body has a limit of its own. HTTP/1.0 knows no chunks."""
        self._have_head()
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            self.cycle.__class__ = _Unchunked
            self.cycle.chunked_encoding = False

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.limits.head_timeout_s, self.transport.abort)

    def _have_head(self) -> None:
        if self._head:
            self._head.cancel()
            self._head = None


class _Unchunked(RequestResponseCycle):
    """An answer whose end is that of the connection."""

    async def send(self, message: Message) -> None:  # type: ignore[override]
        self.expected_content_length = len(message.get("body", b""))
        await super().send(message)  # type: ignore[arg-type]


class _DrainingServer(uvicorn.Server):
    """Uvicorn closes its socket at the first signal. This server goes on answering 503 until present requests finish."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second one ends the process at once, whatever its threads wait for."""
        if self._draining or self._loop is None:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        else:
            limit = self._server.settings.drain_timeout_s
            logger.info("%s: waiting at most %g s for requests to finish", signal.Signals(sig).name, limit)
            threading.Thread(target=_end_after, args=(limit + _LAST_BYTES_S + _LAST_THREADS_S,), daemon=True).start()
            self._draining = self._loop.create_task(self._drain(limit))
            self._loop.call_soon_threadsafe(lambda: None)  # a signal handler does not wake the loop

    async def _drain(self, timeout_s: float) -> None:
        await self._server.drain(timeout_s)
        await self._server.watcher.close()  # unfinished streams end with an error
        self.should_exit = True


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(0)


def _allow_files(count: int) -> None:
    """Let this process open so many files, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
