"""The inference worker: one thread that answers queued requests, one after another.

It knows nothing about HTTP. It sends a job's events to a callback, in the worker's thread.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from samq.errors import SamqError
from samq.serving.logprobs import TokenLogprob, token_logprob
from samq.serving.metrics import Metrics
from samq.serving.model import ServedModel
from samq.serving.refusal import Refused
from samq.serving.sampling import SamplerSettings, check_grammar
from samq.serving.text import TextAssembler

logger = logging.getLogger(__name__)

_MOST_RETRY_AFTER_S = 60
_LAST_BATCH_S = 2.0  # time for the worker to end: llama.cpp cannot be interrupted within a batch
_LEAST_DELTA_S = 0.05  # nobody reads faster, and every delta takes time from llama.cpp's threads


@dataclass(frozen=True)
class Work:
    """A request for generated tokens, for any model."""

    tokenize: Callable[[ServedModel], list[int]]  # raises Refused
    sampling: SamplerSettings
    max_tokens: int | None = None  # None: as many as the context has room for
    stops: Sequence[str] = ()
    logprobs: int | None = None  # alternatives to each token; None: no log probabilities at all


@dataclass(frozen=True)
class Delta:
    """More of the answer."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of the answer."""

    reason: str  # stop: the model ended, or a stop sequence appeared; length: max_tokens
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


AnswerEvent = Delta | Finished | Refused


@dataclass(eq=False)
class Job:
    """A request that is queued or being answered."""

    work: Work
    emit: Callable[[AnswerEvent], None]
    stream: bool  # whether the client gets the answer in parts, or all of it at the end
    created: float = field(default_factory=time.monotonic)
    model: ServedModel | None = None  # the model that the prompt was tokenized for
    prompt: list[int] = field(default_factory=list)
    limit: int = 0  # of generated tokens
    started: bool = False
    cancelled: bool = False

    def fit(self, model: ServedModel) -> None:
        """Tokenize the prompt for a model; raises Refused (400) if that model cannot answer it."""
        self.prompt, self.limit = _check(self.work, model)
        self.model = model


class Engine:
    """The queue, the worker, and the model that serves."""

    def __init__(self, queue_size: int, metrics: Metrics) -> None:
        """Starts the worker, which waits for a model."""
        self._queue_size = queue_size
        self._metrics = metrics
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._model: ServedModel | None = None
        self._running: Job | None = None
        self._between_models = False
        self._draining = False
        self._seconds_per_job = 1.0  # moving average
        metrics.processing.set_function(lambda: float(self._running is not None))
        metrics.deferred.set_function(lambda: float(len(self._queue)))
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def model(self) -> ServedModel | None:
        """The model that serves now; it may be replaced at any time."""
        return self._model

    @property
    def draining(self) -> bool:
        """Whether the engine refuses new requests."""
        return self._draining

    def exchange(self, new: ServedModel | None, *, more_to_come: bool = False) -> ServedModel | None:
        """Let another model, or none, answer from the next request on; the caller closes the old one, which this returns.

        Without a model the engine refuses all requests, including those in the queue. With `more_to_come` they wait.
        """
        with self._changed:
            old, self._model = self._model, new
            self._between_models = more_to_come
            while self._queue and not (new or more_to_come):
                self._queue.popleft().emit(_no_model())
            self._changed.notify_all()
        self._metrics.show_model(new.gguf if new else None)
        return old

    def check_room(self) -> None:
        """Raises Refused (429 or 503) if `prepare` would do so now: a cheap check before work on a request."""
        with self._changed:
            self._refuse_if_unavailable()
            self._refuse_if_full()

    def prepare(self, work: Work, emit: Callable[[AnswerEvent], None], *, stream: bool) -> Job:
        """Tokenize and check a request. Do not call it on the event loop: a long prompt takes milliseconds.

        Raises Refused: 400 if the model cannot answer the request, 429 if the queue is full, 503 without a model or when
        the server is shutting down.
        """
        job = Job(work, emit, stream)
        with self._changed:
            self._refuse_if_unavailable()
            self._refuse_if_full()
            model = self._model
            if model is None:  # between two: the worker tokenizes
                return job
            model.acquire()
        try:
            job.fit(model)
        finally:
            model.release()
        return job

    def submit(self, job: Job) -> None:
        """Queue a prepared job; raises Refused (429 or 503) as `prepare` does."""
        with self._changed:
            self._refuse_if_unavailable()
            self._refuse_if_full()
            self._queue.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Give up a job, queued or running; does nothing if it has finished."""
        with self._changed:
            job.cancelled = True
            if job in self._queue:
                self._queue.remove(job)
                self._changed.notify_all()

    def retry_after_s(self) -> int:
        """Seconds until a place in the queue is likely to be free."""
        return min(max(1, math.ceil(self._seconds_per_job)), _MOST_RETRY_AFTER_S)

    def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait until the present ones have finished, and give up those left after the timeout."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            finished = self._changed.wait_for(lambda: not self._queue and not self._running, timeout_s)
            left = [*self._queue, *([self._running] if self._running else [])]
            self._queue.clear()
            self._changed.notify_all()
            for job in left:
                job.cancelled = True
                job.emit(_shutting_down())
        if not finished:
            logger.warning("gave up %d requests that did not finish within %g s", len(left), timeout_s)

    def close(self) -> bool:
        """Give up all requests, end the worker, and free the model.

        Returns False, and frees nothing, if the worker does not end in time.
        """
        self.drain(0)
        self._thread.join(_LAST_BATCH_S)
        if self._thread.is_alive():
            return False
        if old := self.exchange(None):
            old.close()
        return True

    def _refuse_if_unavailable(self) -> None:
        if self._draining:
            raise _shutting_down()
        if not (self._model or self._between_models):
            raise _no_model()

    def _refuse_if_full(self) -> None:
        idle = self._running is None and not self._queue and self._model
        if len(self._queue) >= self._queue_size and not idle:
            raise Refused(
                429,
                f"the queue is full, with {len(self._queue)} requests; try again later",
                code="queue_full",
                retry_after_s=self.retry_after_s(),
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._draining if not self._queue else bool(self._model))
                if not self._queue:
                    return
                job, model = self._queue.popleft(), self._model
                assert model
                self._running = job
                model.acquire()
            try:
                self._answer(job, model)
            except Refused as refused:
                job.emit(refused)
            except Exception as error:
                logger.exception("a request failed")
                reason = str(error) if isinstance(error, SamqError) else "see the server's log"
                job.emit(Refused(500, f"the model could not answer: {reason}", code="inference_failed"))
            finally:
                model.release()
                self._metrics.kv_cache.set(0)

    def _answer(self, job: Job, model: ServedModel) -> None:
        metrics, work = self._metrics, job.work
        if job.model is not model:  # replaced while the job waited
            job.fit(model)
        job.started = True
        began = latest = time.monotonic()
        metrics.queue_wait.observe(began - job.created)
        metrics.prompt_tokens.inc(len(job.prompt))
        answer = _Answer(job, model)
        tokens = 0
        reason = "length"
        with closing(model.generate(job.prompt, work.sampling, lambda: job.cancelled)) as generated:
            for token in generated:
                now = time.monotonic()
                if tokens:
                    metrics.inter_token.observe(now - latest)
                else:
                    metrics.first_token.observe(now - job.created)
                latest = now
                if model.model.is_end(token.id):
                    reason = "stop"
                    break
                tokens += 1
                metrics.predicted_tokens.inc()
                metrics.kv_cache.set((len(job.prompt) + tokens) / model.loading.context_tokens)
                logprob = token_logprob(model.model, token, work.logprobs) if work.logprobs is not None else None
                if answer.add(model.model.piece(token.id), logprob, now):
                    reason = "stop"
                    break
                if tokens == job.limit or job.cancelled:
                    break
            cached = model.reused_tokens
        metrics.cached_tokens.inc(cached)
        if not job.cancelled:
            answer.end()
            metrics.end_to_end.observe(time.monotonic() - job.created)
            self._seconds_per_job += 0.2 * (time.monotonic() - began - self._seconds_per_job)
            job.emit(Finished(reason, len(job.prompt), cached, tokens))


class _Answer:
    """Turns tokens into deltas: for a stream as they come, but no faster than people read; otherwise at the end."""

    def __init__(self, job: Job, model: ServedModel) -> None:
        self._job = job
        self._assembler = TextAssembler(job.work.stops)
        self._given_out_at = -math.inf
        self._text: list[str] = []
        self._logprobs: list[tuple[int, TokenLogprob]] = []  # where a token's text begins; those not given out yet

    def add(self, piece: bytes, logprob: TokenLogprob | None, now: float) -> bool:
        """Add a token that came `now`; returns whether a stop sequence has appeared."""
        text = self._assembler.push(piece)
        if logprob:
            self._logprobs.append((self._assembler.start, logprob))
        if text:
            self._text.append(text)
            if self._job.stream and now - self._given_out_at >= _LEAST_DELTA_S:
                self._give_out()
                self._given_out_at = now
        return self._assembler.stopped

    def end(self) -> None:
        """Emit the rest."""
        if text := self._assembler.finish():
            self._text.append(text)
        self._give_out(last=True)

    def _give_out(self, *, last: bool = False) -> None:
        """Emit the text and its tokens; the tokens after it may still turn out to be part of a stop sequence."""
        end = math.inf if last and not self._assembler.stopped else self._assembler.sent
        logprobs = tuple(logprob for start, logprob in self._logprobs if start < end)
        self._logprobs = self._logprobs[len(logprobs) :]
        if self._text or logprobs:
            self._job.emit(Delta("".join(self._text), logprobs))
            self._text = []


def _no_model() -> Refused:
    return Refused(503, "no model is loaded; see /ready", code="model_not_loaded", retry_after_s=5)


def _shutting_down() -> Refused:
    return Refused(503, "the server is shutting down", code="shutting_down", retry_after_s=5)


def _check(work: Work, model: ServedModel) -> tuple[list[int], int]:
    """The prompt's tokens, and how many may follow; raises Refused (400, with the numbers) if there is no room."""
    prompt, room = work.tokenize(model), model.loading.context_tokens
    if not prompt:
        raise Refused(400, "the prompt has no tokens; send some text", code="empty_prompt", param="prompt")
    if len(prompt) + (work.max_tokens or 1) > room:
        excess = f"max_tokens asks for {work.max_tokens} more" if work.max_tokens else "no room is left for an answer"
        raise Refused(
            400,
            f"the context holds {room} tokens, the prompt has {len(prompt)}, and {excess}; shorten one of them",
            code="context_length_exceeded",
            param="max_tokens" if work.max_tokens and len(prompt) < room else "prompt",
        )
    if work.sampling.grammar:
        check_grammar(model.model, work.sampling.grammar)
    return prompt, work.max_tokens or room - len(prompt)
