"""Passes a request on to the engine and its answer back, piece by piece as it comes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from samq.serving.admission import Admission, shutting_down
from samq.serving.child import Child, LostError, NotReachedError
from samq.serving.metrics import Metrics
from samq.serving.refusal import Refused, refused_by_engine
from samq.serving.settings import ServingSettings

logger = logging.getLogger(__name__)

STATUS = "samq.status"  # in a request's scope: the status to count, if it differs from the one that was sent
BEGAN = "samq.began"  # in a request's scope: the loop's time at its first byte
_CLIENT_LEFT = 499  # nginx's number; nobody receives it
_DYING_S = 0.5  # between the end of an engine's connections and that of its process
_LAST_WORDS_S = 1.0  # for the error at a stream's end: the client may not read
_COMMENT = b": waiting\n\n"
_EVENTS = "text/event-stream"


async def receive_body(request: Request, settings: ServingSettings) -> bytes:
    """The whole body; raises HTTPException (408, 413, 415) if it is too slow, too long, or compressed."""
    began = request.scope.setdefault(BEGAN, asyncio.get_running_loop().time())
    limit = settings.max_body_bytes
    closing = {"connection": "close"}  # what is left of the body would be read as the next request
    too_long = HTTPException(413, f"the body is longer than {limit} bytes; send less", closing)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "the body is compressed; send it as it is", closing)
    if (length := request.headers.get("content-length", "")).isdigit() and int(length[:20]) > limit:
        raise too_long
    body = bytearray()
    late_at = began + min(settings.body_timeout_s, settings.request_timeout_s)
    try:
        async with asyncio.timeout_at(late_at):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise HTTPException(
            408, f"the body took longer than {settings.body_timeout_s:g} s; send it faster", closing
        ) from None
    return bytes(body)


class Exchange(Response):
    """The engine's answer to one request, with its deadline, and its client, who may leave."""

    def __init__(
        self,
        request: Request,
        path: str,
        body: bytes,
        streams: bool,
        slots: int,
        admission: Admission,
        metrics: Metrics,
        settings: ServingSettings,
    ) -> None:
        """`path` is the engine's, and `slots` what the request takes of it; a stream gets comments while its client waits."""
        self.background = None
        self._path = path
        self._body = body
        self._streams = streams
        self._slots = slots
        self._admission = admission
        self._metrics = metrics
        self._settings = settings
        self._identity: Callable[[], dict[str, str]] = dict
        self._scope = request.scope
        self._loop = asyncio.get_running_loop()
        self._began = float(request.scope.setdefault(BEGAN, self._loop.time()))
        self._begun = False  # whether the answer has
        self._last_sent = self._loop.time()
        self._between_events = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; an error before the answer has begun is raised as Refused."""
        self._send = send
        work = asyncio.create_task(self._answer())
        leaving = asyncio.create_task(_until_left(receive))
        comments = asyncio.create_task(self._comment()) if self._streams else None
        try:
            await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                scope[STATUS] = _CLIENT_LEFT
            else:
                await work
        finally:
            for task in filter(None, (work, leaving, comments)):
                task.cancel()
            await asyncio.wait([task for task in (work, leaving) if not task.done()] or [leaving])

    async def _answer(self) -> None:
        try:
            async with asyncio.timeout_at(self._began + self._settings.request_timeout_s):
                await self._pass_on()
        except TimeoutError:
            limit = f"{self._settings.request_timeout_s:g} s"
            await self._fail(
                Refused(504, f"the request took longer than {limit}; ask for fewer tokens", code="request_timeout")
            )
        except Refused as refused:
            await self._fail(refused)

    async def _pass_on(self) -> None:
        while True:
            child = await self._enter()
            entered = self._loop.time()
            self._identity = child.identity
            self._metrics.queue_wait.observe(entered - self._began)
            seconds = None
            try:
                await self._ask(child)
                seconds = self._loop.time() - entered
                return
            except NotReachedError:
                continue  # the engine never got the request, so the next one may
            except LostError as error:
                await child.until_ended(_DYING_S)  # before its slot is free: the next request must not go there
                if self._admission.draining:
                    raise shutting_down() from error
                logger.warning("%s: %s", self._path, error)
                raise Refused(
                    503, "the engine ended while it answered; ask again", code="engine_lost", retry_after_s=1
                ) from error
            finally:
                self._admission.leave(child, self._slots, seconds)

    async def _enter(self) -> Child:
        try:
            return await self._admission.enter(self._slots)
        except asyncio.CancelledError:
            if self._loop.time() < self._began + self._settings.request_timeout_s:
                raise
            limit = f"{self._settings.request_timeout_s:g} s"
            raise Refused(
                503,
                f"no slot was free for {limit} in the queue; try again later",
                code="queue_timeout",
                retry_after_s=10,
            ) from None

    async def _ask(self, child: Child) -> None:
        """Pass the engine's answer on; raises Refused for an error of the engine's."""
        async with child.ask(self._path, self._body) as response:
            pieces = child.heard(response)
            if response.status != 200:
                raise refused_by_engine(response.status, b"".join([piece async for piece in pieces]))
            kind = response.headers.get("content-type", "application/json")
            if not kind.startswith(_EVENTS):
                body = b"".join([piece async for piece in pieces])
                await self._begin(kind, len(body))
                await self._send({"type": "http.response.body", "body": body})
            else:
                await self._stream(pieces)
        self._metrics.end_to_end.observe(self._loop.time() - self._began)

    async def _stream(self, pieces: AsyncIterator[bytes]) -> None:
        last = None
        async for piece in pieces:
            now = self._loop.time()
            if last is None:
                self._metrics.first_token.observe(now - self._began)
                await self._begin(_EVENTS)
            else:
                self._metrics.inter_token.observe(now - last)
            last = self._last_sent = now
            self._between_events = piece.endswith(b"\n\n")
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._begin(_EVENTS)
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, kind: str, length: int | None = None) -> None:
        if self._begun:
            return
        self._begun = True
        headers = {"content-type": kind, **self._identity()}
        headers |= (
            {"cache-control": "no-cache", "x-accel-buffering": "no"}
            if length is None
            else {"content-length": str(length)}
        )
        encoded = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": encoded})

    async def _comment(self) -> None:
        """Send a comment whenever the stream has been silent for long: a proxy in front would close it."""
        interval = self._settings.comment_interval_s
        while True:
            silent = self._loop.time() - self._last_sent
            await asyncio.sleep(max(0.01, interval - silent))
            if self._loop.time() - self._last_sent >= interval and self._between_events:
                self._last_sent = self._loop.time()
                await self._begin(_EVENTS)
                await self._send({"type": "http.response.body", "body": _COMMENT, "more_body": True})

    async def _fail(self, refused: Refused) -> None:
        """Raise the error, or make it the last event of a stream that has begun."""
        if not self._begun:
            refused.identity = self._identity()
            raise refused
        self._scope[STATUS] = refused.status
        event = (b"" if self._between_events else b"\n\n") + refused.last_event(self._path)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._send({"type": "http.response.body", "body": event})


async def _until_left(receive: Receive) -> None:
    with suppress(ClientDisconnect):
        while (await receive())["type"] != "http.disconnect":
            pass
