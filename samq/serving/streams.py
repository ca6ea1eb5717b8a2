"""Turns the worker's events into the body of an HTTP answer: whole, or as server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from samq.serving.answers import Shape
from samq.serving.engine import AnswerEvent, Delta, Engine, Finished, Job, Work
from samq.serving.middleware import STATUS
from samq.serving.refusal import Refused

logger = logging.getLogger(__name__)

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # `json.dumps` would make one for each delta
_DONE = b"data: [DONE]\n\n"
_CLIENT_LEFT = 499  # nginx's number; nobody receives it


class Exchange:
    """One request at the worker: its events, its deadline, and its client, who may leave."""

    def __init__(self, engine: Engine, request: Request, timeout_s: float) -> None:
        """The timeout starts here."""
        self._engine = engine
        self._request = request
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._events: asyncio.Queue[AnswerEvent] = asyncio.Queue()
        self._job: Job | None = None
        self._alarm: asyncio.TimerHandle | None = None

    async def answer(self, work: Work, shape: Callable[[str], Shape], *, stream: bool, usage: bool) -> Response:
        """Queue the work, and return the answer; raises Refused.

        A stream begins with its first text, so that an error before it has its own HTTP status.
        """
        job = await asyncio.to_thread(self._engine.prepare, work, self._emit, stream=stream)
        self._engine.submit(job)
        self._job = job
        # One timer for all events: a limit on the wait for each would cost the event loop as much as an event.
        self._alarm = self._loop.call_at(self._deadline, self._expire)
        try:
            first = await self._first()
            assert job.model, "a job that has answered has its model"
            words = shape(job.model.gguf.name)
            if not stream:
                delta = first if isinstance(first, Delta) else Delta("")
                finished = first if isinstance(first, Finished) else await self._next()
                assert isinstance(finished, Finished)
                self._end()
                return JSONResponse(words.whole(delta, finished))
        except BaseException:
            self._end()
            raise
        return _EventStream(self._stream(first, words, usage), self._end)

    def _end(self) -> None:
        """Stop the timer, and the worker if it is still on this job."""
        if self._alarm:
            self._alarm.cancel()
        if self._job:
            self._engine.cancel(self._job)

    def _expire(self) -> None:
        """End the request at its deadline: the worker stops at once, the client learns it at its next event."""
        late = self._too_late()
        self._end()
        self._events.put_nowait(late)

    def _emit(self, event: AnswerEvent) -> None:
        """Queue an event; the worker calls this."""
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _first(self) -> AnswerEvent:
        """The first event; raises it if it is a Refused, and raises Refused if the client leaves."""
        waiting = asyncio.create_task(self._next())
        leaving = asyncio.create_task(self._client_leaves())
        try:
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise Refused(_CLIENT_LEFT, "the client left")
            return waiting.result()
        finally:
            for task in (waiting, leaving):
                task.cancel()
            await asyncio.gather(waiting, leaving, return_exceptions=True)

    async def _client_leaves(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> AnswerEvent:
        """The next event; raises it if it is a Refused, as after the deadline."""
        event = await self._events.get()
        if isinstance(event, Refused):
            raise event
        return event

    def _too_late(self) -> Refused:
        if self._job and not self._job.started:
            return Refused(
                503,
                f"the request waited {self._timeout_s:g} s in the queue, the limit of this server; try again later",
                code="queue_timeout",
                retry_after_s=self._engine.retry_after_s(),
            )
        return Refused(
            504,
            f"the answer took longer than {self._timeout_s:g} s, the limit of this server; ask for fewer tokens",
            code="request_timeout",
        )

    def _merge(self, delta: Delta) -> tuple[Delta, AnswerEvent | None]:
        """One delta of this and all that have arrived since, and the event after them if that has arrived too."""
        deltas = [delta]
        following: AnswerEvent | None = None
        while following is None and not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, Delta):
                deltas.append(event)
            else:
                following = event
        text = "".join(one.text for one in deltas)
        return Delta(text, tuple(token for one in deltas for token in one.logprobs)), following

    async def _stream(self, event: AnswerEvent, shape: Shape, usage: bool) -> AsyncGenerator[bytes]:
        """Server-sent events. An error after the first event becomes an event, and ends the stream."""
        ended = False
        try:
            while isinstance(event, Delta):
                delta, following = self._merge(event)
                yield b"".join(map(_sse, shape.chunks(delta)))
                event = following or await self._next()
            if isinstance(event, Refused):
                raise event
            tail = _sse(shape.last(event))
            if usage:
                tail += _sse(shape.usage(event))
            ended = True
            yield tail + _DONE
        except Refused as refused:
            ended = True
            self._request.scope[STATUS] = refused.status
            logger.warning("a stream ended early: %s", refused)
            yield _sse(refused.body) + _DONE
        finally:
            if not ended:
                self._request.scope[STATUS] = _CLIENT_LEFT


class _EventStream(StreamingResponse):
    """Always closes the generator and ends the exchange, even if the client leaves during a chunk."""

    def __init__(self, events: AsyncGenerator[bytes], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._events = events
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()
            await self._events.aclose()


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + _json.encode(body).encode() + b"\n\n"
