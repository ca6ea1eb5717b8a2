"""Follows the source of the model: starts the first version, and changes to a new one while requests go on."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any, TypeVar

from samq.errors import NotRegisteredError, SamqError, UnreachableError
from samq.serving.admission import Admission
from samq.serving.child import StartError
from samq.serving.metrics import Metrics
from samq.serving.served import Served, fits_beside
from samq.serving.settings import ServingSettings
from samq.serving.source import ServedGguf, Source, altered, content_sha256, looks_changed
from samq.serving.warmup import RecentPrompts, Unfit, token_agreement

logger = logging.getLogger(__name__)

T = TypeVar("T")
_RETRY_S = (60.0, 3600.0)  # first and longest wait before the next attempt after a failed load, while a model serves
_LOOK_S = 1.0  # between two looks at the files that serve
_MOST_WAIT_S = 600.0  # the longest wait while no model serves; the first wait is then the poll interval


class Watcher:
    """Polls the source, and starts a new version when the source names one."""

    def __init__(
        self, source: Source, admission: Admission, settings: ServingSettings, metrics: Metrics, recent: RecentPrompts
    ) -> None:
        """Nothing happens before `start`."""
        self.serving: Served | None = None
        self._source = source
        self._admission = admission
        self._settings = settings
        self._metrics = metrics
        self._recent = recent
        self._lookup_problem: str | None = None
        self._load_problem: str | None = None
        self._file_problem: str | None = None
        self._cannot_be_served = False  # what the source names
        self._failed: ServedGguf | None = None
        self._retries = 0
        self._retry_at = 0.0
        self._others: set[Served] = set()  # starting or draining
        metrics.reload_failed.set_function(
            lambda: float(self._cannot_be_served or bool(self._load_problem or self._file_problem))
        )
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def problem(self) -> str | None:
        """Why the source's model is unknown or not served, or not as it should be; None if all is well."""
        engine = self.serving.problem if self.serving else None
        return engine or self._lookup_problem or self._load_problem or self._file_problem

    def start(self) -> None:
        """Start polling."""
        self._go_on(_again_and_again(self.check, self._settings.poll_interval_s))
        self._go_on(_again_and_again(self._look_at_files, _LOOK_S))

    async def close(self) -> None:
        """Stop polling, and end every engine."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        every = [*self._others, *([self.serving] if self.serving else [])]
        self.serving = None
        self._admission.serve(None)
        await asyncio.gather(*(served.close() for served in every), return_exceptions=True)

    async def check(self) -> None:
        """Ask the source once, and start its version unless that serves already, or failed a short time ago."""
        serving = self.serving
        try:
            gguf = await _in_thread(self._source)
        except UnreachableError as error:
            self._metrics.lookup_failures.inc()
            self._report(str(error))
            return
        except NotRegisteredError as error:
            self._settle()
            self._report(f"{error}; {serving.gguf} keeps serving" if serving else f"nothing to serve yet: {error}")
            return
        except SamqError as error:  # the source names a model that cannot be served here
            self._cannot_be_served = True
            self._report(str(error))
            return
        self._lookup_problem = None
        if serving and _same_content(serving.gguf, gguf):
            if serving.gguf != gguf:
                serving.gguf = gguf
                self._metrics.show_model(gguf)
            self._settle()
        elif gguf != self._failed or asyncio.get_running_loop().time() >= self._retry_at:
            await self._change(serving, gguf)

    async def _look_at_files(self) -> None:
        """Say if a registered file that serves is gone or altered. What serves has read it all, and goes on.

        Of a plain file, the source tells the SHA-256 that it has now.
        """
        serving, problem = self.serving, None
        if serving is None or not serving.gguf.version:
            return
        serves_on = f"{serving.gguf} serves on, as it was read before"
        for path, expected in serving.gguf.files:
            try:
                if await _in_thread(partial(looks_changed, path)):  # reading 40 GB takes tens of seconds
                    self._file_problem = f"{path} may have changed, and is read again; {serves_on}"
                if (sha256 := await _in_thread(partial(content_sha256, path))) != expected:
                    problem = f"{altered(path, sha256, expected)}; {serves_on}"
            except SamqError as error:
                problem = f"{error}; {serves_on}"
        if self.serving is not serving:
            return
        if problem and problem != self._file_problem:
            logger.error("%s", problem)
        self._file_problem = problem

    async def _change(self, serving: Served | None, gguf: ServedGguf) -> None:
        try:
            await self._replace(serving, gguf)
        except Exception as error:
            self._retries = self._retries + 1 if gguf == self._failed else 0
            self._failed = gguf
            self._retry_at = asyncio.get_running_loop().time() + self._wait_s(error)
            self._metrics.reloads.labels("failure").inc()
            instead = f"; {self.serving.gguf} keeps serving" if self.serving else ""
            self._load_problem = f"{gguf} is not served: {error}{instead}"
            logger.error("%s", self._load_problem, exc_info=not isinstance(error, SamqError))
        else:
            self._metrics.reloads.labels("success").inc()
            logger.info("%s serves", gguf)
            self._settle()
            self._file_problem = None

    def _wait_s(self, error: Exception) -> float:
        """Seconds until the next attempt after a failure: by then memory may be free, or the file put back."""
        first, most = _RETRY_S if self.serving else (self._settings.poll_interval_s, _MOST_WAIT_S)
        if isinstance(error, Unfit) and self.serving:
            return math.inf
        return float(min(first * 2.0 ** min(self._retries, 32), most))

    async def _replace(self, serving: Served | None, gguf: ServedGguf) -> None:
        """Start a version and let it serve; raises if that fails, and the old one then serves."""
        new = await _in_thread(lambda: Served(gguf, self._settings, self._metrics, self._admission.changed))
        self._others.add(new)
        try:
            if serving is None:
                await new.start()
            elif not await self._start_beside(serving, new):
                await self._start_after(serving, new)
            elif serving.child and new.child:
                await self._compare(serving, new)
        except BaseException:
            self._others.discard(new)
            await new.close()
            raise
        self._others.discard(new)
        self._serve(new)
        if serving:
            self._retire(serving)

    def _serve(self, served: Served) -> None:
        self.serving = served
        self._admission.serve(served)
        self._metrics.show_model(served.gguf)

    def _retire(self, old: Served) -> None:
        """Let the old version finish its requests, and end it."""

        async def drain() -> None:
            try:
                await self._until_idle(old)
            finally:
                await old.close()
                self._others.discard(old)

        self._others.add(old)
        self._go_on(drain())

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _until_idle(self, old: Served) -> None:
        while old.child and old.child.leases:  # each has its deadline
            await asyncio.sleep(0.05)

    async def _start_beside(self, serving: Served, new: Served) -> bool:
        """Start a version while the old one serves; False if memory does not hold both, by llama.cpp's plan or in fact.

        It might fit with fewer GPU layers or a shorter context, but would then keep these after the old one is gone.
        """
        if not await _in_thread(lambda: fits_beside(new, self._settings)):
            logger.warning("by llama.cpp's plan, %s does not fit into memory beside %s", new.gguf, serving.gguf)
            return False
        try:
            await new.start(degrade=False)
        except StartError as error:
            if not error.out_of_memory:
                raise
            logger.warning("%s does not fit into memory beside %s: %s", new.gguf, serving.gguf, error)
            return False
        return True

    async def _start_after(self, serving: Served, new: Served) -> None:
        """End the old version before the new one starts; requests wait meanwhile."""
        logger.warning("ending %s before starting %s; requests wait", serving.gguf, new.gguf)
        if self._settings.shadow.prompts:
            logger.warning("skipping the shadow check: it needs both models in memory")
        self._admission.serve(None, more_to_come=True)
        await self._until_idle(serving)
        await serving.pause()
        try:
            await new.start()
        except Exception as failure:
            logger.warning("cannot start %s; starting %s again", new.gguf, serving.gguf)
            try:
                await serving.start()
            except Exception as loss:
                self.serving = None
                self._admission.serve(None)
                self._metrics.show_model(None)
                await serving.close()
                raise SamqError(f"{failure}; and cannot start {serving.gguf} again: {loss}") from failure
            self._serve(serving)
            raise

    async def _compare(self, serving: Served, new: Served) -> None:
        """The shadow check, if the settings ask for it; raises Unfit if the models agree too little."""
        shadow = self._settings.shadow
        prompts = self._recent.newest()
        if not prompts or not serving.child or not new.child:
            return
        share = await token_agreement(serving.child, new.child, prompts, shadow.tokens)
        if share is None:
            return
        self._metrics.shadow_agreement.set(share)
        logger.info(
            "shadow check: %s and %s agree on %.3f of the tokens of %d prompts",
            serving.gguf, new.gguf, share, len(prompts),
        )  # fmt: skip
        if shadow.least_agreement is not None and share < shadow.least_agreement:
            raise Unfit(
                f"it agrees with {serving.gguf} on {share:.3f} of the tokens of {len(prompts)} recent prompts, less than "
                f"least_agreement ({shadow.least_agreement}); lower that if the difference is intended"
            )

    def _settle(self) -> None:
        """Clear the load problem."""
        self._load_problem, self._failed, self._cannot_be_served = None, None, False

    def _report(self, problem: str) -> None:
        """Record a problem of asking the source, and log it if it is new."""
        if problem != self._lookup_problem:
            logger.error("%s", problem)
        self._lookup_problem = problem


async def _again_and_again(check: Callable[[], Awaitable[None]], seconds: float) -> None:
    """Check with pauses of so many seconds, until the task is cancelled."""
    while True:
        try:
            await check()
        except Exception:  # the next check must come, whatever a file or a registry does
            logger.exception("cannot check what serves, or what is to serve")
        await asyncio.sleep(seconds)


def _same_content(one: ServedGguf, other: ServedGguf) -> bool:
    """Whether both are the same bytes under the same name, so that there is nothing to load."""
    return (one.name, one.sha256, one.mmproj_sha256) == (other.name, other.sha256, other.mmproj_sha256)


async def _in_thread(function: Callable[[], T]) -> T:
    """Call a function in a daemon thread: MLflow may not answer for minutes, and a thread of a pool holds up the end."""
    done: Future[Any] = Future()

    def call() -> None:
        with suppress(InvalidStateError):  # nobody waits any more
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

    Thread(target=call, daemon=True).start()
    result: T = await asyncio.wrap_future(done)
    return result
