"""Follows the source of the model: loads the first model, and changes to a new one while requests go on."""

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
from samq.serving.shadow import RecentPrompts, token_agreement
from samq.serving.source import ServedGguf, Source

logger = logging.getLogger(__name__)

_RETRY_S = (60.0, 3600.0)  # first and longest wait before the next attempt after a failed load, while a model serves
_MOST_WAIT_S = 600.0  # the longest wait while no model serves; the first wait is then the poll interval
_LAST_LOOK_S = 2.0  # time for the thread to end; it may wait for MLflow, or load, for minutes


class Watcher:
    """Polls the source in a thread, and loads a new model when the source names one."""

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
        """Why the source's model is unknown or not served; None if it is served."""
        return self._lookup_problem or self._load_problem

    def start(self) -> None:
        """Start polling."""
        self._thread.start()

    def stop(self) -> bool:
        """Stop polling; returns whether the thread has ended. If it has not, it may still use the engine's model."""
        self._ended.set()
        self._thread.join(_LAST_LOOK_S)
        return not self._thread.is_alive()

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                self.check()
            except Exception:  # the thread must survive any error of a file or a registry
                logger.exception("cannot check for a new model")
            self._ended.wait(self._settings.poll_interval_s)

    def check(self) -> None:
        """Ask the source once, and load its model unless that serves already, or failed a short time ago."""
        serving = self._engine.model
        try:
            gguf = self._source()
        except UnreachableError as error:
            self._metrics.lookup_failures.inc()
            self._report(str(error))
            return
        except NotRegisteredError as error:
            self._settle()
            self._report(f"{error}; {serving.gguf} keeps serving" if serving else f"nothing to serve yet: {error}")
            return
        except SamqError as error:  # the source names a model that cannot be served here
            self._metrics.reload_failed.set(1)
            self._report(str(error))
            return
        self._lookup_problem = None
        if self._ended.is_set():
            return
        if serving and serving.gguf == gguf:
            self._settle()
        elif serving and _same_content(serving.gguf, gguf):
            serving.gguf = gguf
            self._metrics.show_model(gguf)
            self._settle()
        elif gguf != self._failed or time.monotonic() >= self._retry_at:
            self._change(serving, gguf)

    def _change(self, serving: ServedModel | None, gguf: ServedGguf) -> None:
        try:
            # In a thread of its own that ends: OpenMP keeps a team of threads for each thread that has called llama.cpp. If
            # it has more threads than processors, they wait in the kernel instead of spinning. On two cores that cost a
            # third of the throughput.
            with ThreadPoolExecutor(1) as executor:
                executor.submit(self._replace, serving, gguf).result()
        except Exception as error:
            still_serving = self._engine.model
            self._retries = self._retries + 1 if gguf == self._failed else 0
            self._failed = gguf
            self._retry_at = time.monotonic() + self._wait_s(error)
            self._metrics.reloads.labels("failure").inc()
            self._metrics.reload_failed.set(1)
            instead = f"; {still_serving.gguf} keeps serving" if still_serving else ""
            self._load_problem = f"{gguf} is not served: {error}{instead}"
            logger.error("%s", self._load_problem, exc_info=not isinstance(error, SamqError))
        else:
            self._metrics.reloads.labels("success").inc()
            logger.info("%s serves", gguf)
            self._settle()

    def _wait_s(self, error: Exception) -> float:
        """Seconds until the next attempt after a failure: by then memory may be free, or the file put back."""
        first, most = _RETRY_S if self._engine.model else (self._settings.poll_interval_s, _MOST_WAIT_S)
        if isinstance(error, Unfit) and self._engine.model:
            return math.inf
        return float(min(first * 2.0 ** min(self._retries, 32), most))

    def _replace(self, serving: ServedModel | None, gguf: ServedGguf) -> None:
        """Load a model and let it serve; raises if that fails, and the old one then serves."""
        verify(gguf)  # before freeing anything for it
        if serving is None:
            self._engine.exchange(load_verified(gguf, self._settings))
        elif new := self._load_beside(serving, gguf):
            try:
                self._compare(serving, new)
            except Exception:
                new.close()
                raise
            self._engine.exchange(new)
            serving.close()
        else:
            self._replace_alone(serving, gguf)

    def _load_beside(self, serving: ServedModel, gguf: ServedGguf) -> ServedModel | None:
        """Load a model while the old one serves; None if memory does not hold both, by llama.cpp's plan or in fact.

        It might fit with fewer GPU layers or a shorter context, but would then keep these after the old one is gone.
        """
        if not fits_beside(gguf, self._settings):
            logger.warning("by llama.cpp's plan, %s does not fit into memory beside %s", gguf, serving.gguf)
            return None
        try:
            return load_verified(gguf, self._settings, degrade=False)
        except MemoryShort as shortage:
            logger.warning("%s does not fit into memory beside %s: %s", gguf, serving.gguf, shortage)
            return None

    def _replace_alone(self, serving: ServedModel, gguf: ServedGguf) -> None:
        """Free the old model before loading the new one; requests wait meanwhile."""
        logger.warning("freeing %s before loading %s; requests wait", serving.gguf, gguf)
        if self._settings.shadow.prompts:
            logger.warning("skipping the shadow check: it needs both models in memory")
        self._engine.exchange(None, more_to_come=True)
        serving.close()
        try:
            self._engine.exchange(load_verified(gguf, self._settings))
        except Exception as failure:
            logger.warning("cannot load %s; loading %s again", gguf, serving.gguf)
            try:
                self._engine.exchange(load(serving.gguf, self._settings))
            except Exception as loss:
                self._engine.exchange(None)
                raise SamqError(f"{failure}; and cannot load {serving.gguf} again: {loss}") from failure
            raise

    def _compare(self, serving: ServedModel, new: ServedModel) -> None:
        """The shadow check, if the settings ask for it; raises Unfit if the models agree too little."""
        shadow = self._settings.shadow
        prompts = self._recent.newest()
        share = token_agreement(serving, new, prompts, shadow.tokens) if prompts else None
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
        self._load_problem, self._failed = None, None
        self._metrics.reload_failed.set(0)

    def _report(self, problem: str) -> None:
        """Record a problem of asking the source, and log it if it is new."""
        if problem != self._lookup_problem:
            logger.error("%s", problem)
        self._lookup_problem = problem


def _same_content(one: ServedGguf, other: ServedGguf) -> bool:
    """Whether both are the same bytes under the same name, so that there is nothing to load."""
    return (one.name, one.sha256) == (other.name, other.sha256)
