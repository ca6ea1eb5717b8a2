"""Following what is to be served: the first load, and the change to another model while requests go on."""

import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from samq.errors import NotRegisteredError, SamqError, UnreachableError
from samq.serving.engine import Engine
from samq.serving.loading import MemoryShort, Unfit, fits_beside, load, load_verified, verify
from samq.serving.metrics import Metrics
from samq.serving.model import ServedModel
from samq.serving.settings import ServingSettings
from samq.serving.shadow import RecentPrompts, agreement
from samq.serving.source import ServedGguf, Source

logger = logging.getLogger(__name__)

_RETRY_S = (60.0, 3600.0)  # first and longest wait before a failed load is tried again, while another model serves
_MOST_WAIT_S = 600.0  # while none does; the first wait is the poll interval then
_LAST_LOOK_S = 2.0  # for the thread to end; it may be waiting for MLflow, or loading, for minutes


class Watcher:
    """Looks at the source again and again, in a thread, and loads what is new."""

    def __init__(
        self, source: Source, engine: Engine, settings: ServingSettings, metrics: Metrics, recent: RecentPrompts
    ) -> None:
        """Nothing happens before `start`."""
        self._source = source
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._recent = recent
        self._lookup_problem: str | None = None
        self._load_problem: str | None = None
        self._failed: ServedGguf | None = None
        self._retries = 0
        self._retry_at = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    @property
    def problem(self) -> str | None:
        """Why what the source names is not served, or not known; None if all is well."""
        return self._lookup_problem or self._load_problem

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> bool:
        """Look no more; returns whether the thread has ended. If it has not, it may still be using the engine's model."""
        self._ended.set()
        self._thread.join(_LAST_LOOK_S)
        return not self._thread.is_alive()

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                self.check()
            except Exception:  # the thread must outlive whatever a file or a registry does
                logger.exception("cannot follow the model")
            self._ended.wait(self._settings.poll_interval_s)

    def check(self) -> None:
        """Look once, and load what the source names if it is not what serves, or what failed a short time ago."""
        serving = self._engine.model
        try:
            wanted = self._source()
        except UnreachableError as error:
            self._metrics.lookup_failures.inc()
            self._report(str(error))
            return
        except NotRegisteredError as error:
            self._settle()
            self._report(f"{error}; {serving.gguf} keeps serving" if serving else f"nothing to serve yet: {error}")
            return
        except SamqError as error:  # it names what cannot be served here
            self._metrics.reload_failed.set(1)
            self._report(str(error))
            return
        self._lookup_problem = None
        if self._ended.is_set():
            return
        if serving and serving.gguf == wanted:
            self._settle()
        elif serving and _same_content(serving.gguf, wanted):
            serving.gguf = wanted
            self._metrics.show_model(wanted)
            self._settle()
        elif wanted != self._failed or time.monotonic() >= self._retry_at:
            self._change(serving, wanted)

    def _change(self, serving: ServedModel | None, wanted: ServedGguf) -> None:
        try:
            # In a thread that ends: llama.cpp's OpenMP keeps the threads of whoever once called it, and more of them than
            # processors wait in the kernel instead of spinning, which cost a third of the tokens on two.
            with ThreadPoolExecutor(1) as one:
                one.submit(self._replace, serving, wanted).result()
        except Exception as error:
            keeps = self._engine.model
            self._retries = self._retries + 1 if wanted == self._failed else 0
            self._failed = wanted
            self._retry_at = time.monotonic() + self._wait_s(error)
            self._metrics.reloads.labels("failure").inc()
            self._metrics.reload_failed.set(1)
            self._load_problem = f"{wanted} is not served: {error}" + (f"; {keeps.gguf} keeps serving" if keeps else "")
            logger.error("%s", self._load_problem, exc_info=not isinstance(error, SamqError))
        else:
            self._metrics.reloads.labels("success").inc()
            logger.info("%s serves", wanted)
            self._settle()

    def _wait_s(self, error: Exception) -> float:
        """Seconds until what failed is tried again: memory may be free by then, or the file copied or put back."""
        first, most = _RETRY_S if self._engine.model else (self._settings.poll_interval_s, _MOST_WAIT_S)
        if isinstance(error, Unfit) and self._engine.model:
            return math.inf
        return min(first * 2 ** min(self._retries, 32), most)

    def _replace(self, serving: ServedModel | None, wanted: ServedGguf) -> None:
        """Load a model and let it serve; raises if it cannot, and then the old one serves."""
        verify(wanted)  # before anything is freed for it
        if serving is None:
            self._engine.exchange(load_verified(wanted, self._settings))
        elif new := self._load_beside(serving, wanted):
            try:
                self._compare(serving, new)
            except Exception:
                new.close()
                raise
            self._engine.exchange(new)
            serving.close()
        else:
            self._replace_alone(serving, wanted)

    def _load_beside(self, serving: ServedModel, wanted: ServedGguf) -> ServedModel | None:
        """Load a model while the old one serves; None if memory does not suffice for both, as planned or as it proves.

        With fewer layers or a shorter context it might fit, but it would stay so when the old one is gone.
        """
        if not fits_beside(wanted, self._settings):
            logger.warning("%s does not fit beside %s by llama.cpp's plan", wanted, serving.gguf)
            return None
        try:
            return load_verified(wanted, self._settings, degrade=False)
        except MemoryShort as shortage:
            logger.warning("%s does not fit beside %s: %s", wanted, serving.gguf, shortage)
            return None

    def _replace_alone(self, serving: ServedModel, wanted: ServedGguf) -> None:
        """Free the old model before the new one is loaded; requests wait meanwhile."""
        logger.warning("%s is freed before %s is loaded; requests wait", serving.gguf, wanted)
        if self._settings.shadow.prompts:
            logger.warning("the shadow check is left out: it needs both models at once")
        self._engine.exchange(None, more_to_come=True)
        serving.close()
        try:
            self._engine.exchange(load_verified(wanted, self._settings))
        except Exception as failure:
            logger.warning("%s cannot be loaded; %s is loaded again", wanted, serving.gguf)
            try:
                self._engine.exchange(load(serving.gguf, self._settings))
            except Exception as loss:
                self._engine.exchange(None)
                raise SamqError(f"{failure}; and {serving.gguf} cannot be loaded again: {loss}") from failure
            raise

    def _compare(self, serving: ServedModel, new: ServedModel) -> None:
        """The shadow check, if it is asked for; raises Unfit if the models agree too little."""
        shadow = self._settings.shadow
        prompts = self._recent.newest()
        share = agreement(serving, new, prompts, shadow.tokens) if prompts else None
        if share is None:
            return
        self._metrics.shadow_agreement.set(share)
        logger.info(
            "shadow check: %s and %s agree on %.3f of the tokens of %d prompts",
            serving.gguf, new.gguf, share, len(prompts),
        )  # fmt: skip
        if shadow.least_agreement is not None and share < shadow.least_agreement:
            raise Unfit(
                f"it agrees with {serving.gguf} on {share:.3f} of the tokens of {len(prompts)} recent prompts, and "
                f"{shadow.least_agreement} is asked for; lower least_agreement if that is meant"
            )

    def _settle(self) -> None:
        """Nothing that the source names has failed."""
        self._load_problem, self._failed = None, None
        self._metrics.reload_failed.set(0)

    def _report(self, problem: str) -> None:
        """Log a problem of looking up once, however often it is met."""
        if problem != self._lookup_problem:
            logger.error("%s", problem)
        self._lookup_problem = problem


def _same_content(one: ServedGguf, other: ServedGguf) -> bool:
    """Whether there is nothing to load: the same bytes under the same name."""
    return (one.name, one.sha256) == (other.name, other.sha256)
