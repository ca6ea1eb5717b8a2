"""Runs the application: the socket, and a shutdown that lets requests finish."""

import asyncio
import logging
import os
import signal
import socket
from types import FrameType

import uvicorn

from samq.serving.app import Server, create_app
from samq.serving.settings import ServingSettings
from samq.serving.source import Source

logger = logging.getLogger(__name__)

_LAST_BYTES_S = 5  # time for finished answers to reach their clients
# By default MLflow's client retries for 4 minutes if its server is down. These settings limit a lookup, two requests, to
# 15 s; the watcher looks again soon enough. Variables that the environment already has stay as they are.
_MLFLOW = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}


def serve(source: Source, settings: ServingSettings) -> None:
    """Serve until SIGTERM or Ctrl-C. Present requests then have `drain_timeout_s` to finish, and new ones get 503.

    Ends the process if a thread is still running after that.
    """
    for name, value in _MLFLOW.items():
        os.environ.setdefault(name, value)
    server = Server(source, settings)
    config = uvicorn.Config(
        create_app(server),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )
    _DrainingServer(config, server).run()
    if not server.closed:
        logging.shutdown()
        os._exit(0)  # a normal exit would destroy llama.cpp's globals while the thread uses them


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
            logger.info("%s: waiting at most %g s for requests to finish", signal.Signals(sig).name, self._timeout_s)
            self._draining = self._loop.create_task(self._drain())
            self._loop.call_soon_threadsafe(lambda: None)  # a signal handler does not wake the loop

    @property
    def _timeout_s(self) -> float:
        return self._server.settings.drain_timeout_s

    async def _drain(self) -> None:
        await asyncio.to_thread(self._server.engine.drain, self._timeout_s)
        self.should_exit = True
