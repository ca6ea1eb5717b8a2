"""Who may ask the engine, and when: a slot for each answer, a queue before the slots, and a refusal when that is full.

All of it runs in the event loop's thread.
"""

import asyncio
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from samq.serving.child import Child
from samq.serving.metrics import Metrics
from samq.serving.refusal import Refused
from samq.serving.served import Served

_MOST_RETRY_AFTER_S = 60
_PROMPTS = {"/v1/embeddings": "input", "/v1/rerank": "documents"}  # path -> field, where it is not `prompt`


class Admission:
    """The queue before the engine of the version that serves."""

    def __init__(self, slots: int, queue_size: int, metrics: Metrics) -> None:
        """Nothing serves yet."""
        self.draining = False
        self._slots = slots
        self._queue_size = queue_size
        self._metrics = metrics
        self._target: Served | None = None
        self._more_to_come = False
        self._waiting: deque[tuple[asyncio.Future[Child], int]] = deque()  # with the slots that each needs
        self._running = 0
        self._seconds_per_request = 1.0  # moving average
        metrics.running.set_function(lambda: float(self._running))
        metrics.waiting.set_function(lambda: float(len(self._waiting)))
        metrics.slots.set(slots)

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return not (self._running or self._waiting)

    @property
    def ready(self) -> bool:
        """Whether a new request could be answered now."""
        return bool(self._target and self._target.child and not self.draining)

    def serve(self, target: Served | None, *, more_to_come: bool = False) -> None:
        """Send requests to `target` from now on. Without one they are refused, or wait if there is more to come."""
        self._target, self._more_to_come = target, more_to_come
        self.changed()

    def changed(self) -> None:
        """Let waiting requests go on: a slot is free, or another engine serves."""
        if self._target is None and not self._more_to_come:
            for turn, _ in self._waiting:
                if not turn.done():
                    turn.set_exception(shutting_down() if self.draining else _no_model())
            self._waiting.clear()
        while self._waiting and (child := self._child_with(self._waiting[0][1])):
            turn, slots = self._waiting.popleft()
            if not turn.done():
                self._take(child, slots)
                turn.set_result(child)

    async def enter(self, slots: int) -> Child:
        """Wait for slots; `leave` gives them back. Raises Refused if there is no model, or if the queue is full.

        Requests get their slots in the order in which they came: one that needs many is not passed by others.
        """
        if self.draining:
            raise shutting_down()
        if self._target is None and not self._more_to_come:
            raise _no_model()
        if not self._waiting and (child := self._child_with(slots)):
            self._take(child, slots)
            return child
        if len(self._waiting) >= self._queue_size:
            raise self._full()
        turn: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, slots))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave(turn.result(), slots, None)
            raise
        finally:
            if (turn, slots) in self._waiting:
                self._waiting.remove((turn, slots))
                self.changed()

    def leave(self, child: Child, slots: int, seconds: float | None) -> None:
        """Give the slots back; `seconds` that the request took are for the estimate in Retry-After."""
        child.leases -= slots
        self._running -= 1
        if seconds is not None:
            self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
        self.changed()

    def _child_with(self, slots: int) -> Child | None:
        """The engine, if it has so many free slots."""
        child = self._target.child if self._target else None
        return child if child and child.alive and child.leases + slots <= self._slots else None

    def _take(self, child: Child, slots: int) -> None:
        child.leases += slots
        self._running += 1

    def _full(self) -> Refused:
        seconds = (len(self._waiting) + 1) * self._seconds_per_request / self._slots
        return Refused(
            429,
            f"the queue is full, with {len(self._waiting)} requests; try again later",
            code="queue_full",
            retry_after_s=max(1, min(math.ceil(seconds), _MOST_RETRY_AFTER_S)),
        )


def slots_of(path: str, fields: Mapping[str, Any], most: int) -> int:
    """Slots that a request takes, up to `most`: one for each answer to each of its prompts, as the engine does it."""
    prompts = fields.get(_PROMPTS.get(path, "prompt"))
    # With a number in it, the list is one prompt of tokens.
    count = len(prompts) if isinstance(prompts, list) and not any(isinstance(one, int) for one in prompts) else 1
    answers = fields.get("n", fields.get("n_cmpl"))
    return max(1, min(count * answers if isinstance(answers, int) else count, most))


def shutting_down() -> Refused:
    """What a request gets while the server ends."""
    return Refused(503, "the server is shutting down; ask another one", code="shutting_down", retry_after_s=10)


def _no_model() -> Refused:
    return Refused(503, "no model is loaded; see /ready for the reason", code="model_not_loaded", retry_after_s=10)
