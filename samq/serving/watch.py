"""Following what is to be served: the first load, and the change to another model while requests go on."""

import logging
import threading
import time

from samq.errors import SamqError
from samq.serving.engine import Engine
from samq.serving.loading import fits_beside, load
from samq.serving.metrics import Metrics
from samq.serving.model import ServedModel
from samq.serving.settings import ServingSettings
from samq.serving.shadow import RecentPrompts, agreement
from samq.serving.source import ServedGguf, Source

logger = logging.getLogger(__name__)

_MOST_WAIT_S = 600  # between attempts to load while nothing serves


class Watcher:
    """Looks at the source again and again, in a thread, and loads what is new."""

    def __init__(
        self, source: Source, engine: Engine, settings: ServingSettings, metrics: Metrics, recent: RecentPrompts
    ) -> None:
        """Nothing happens before `start`."""
        self.problem: str | None = None  # why what the source names is not served
        self._source = source
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._recent = recent
        self._failed: ServedGguf | None = None
        self._wait_s = settings.poll_interval_s
        self._retry_at = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; waits for a load that is going on."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                self.check()
            except Exception:  # the thread must outlive whatever a file or a registry does
                logger.exception("cannot follow the model")
            self._ended.wait(self._settings.poll_interval_s)

    def check(self) -> None:
        """Look once, and load what the source names if it is not what serves, or what has just failed."""
        try:
            wanted = self._source()
        except SamqError as error:
            self._metrics.lookup_failures.inc()
            self._report(str(error))
            return
        serving = self._engine.model
        if serving and serving.gguf == wanted:
            self._settle()
        elif serving and _same_content(serving.gguf, wanted):
            serving.gguf = wanted
            self._metrics.show_model(wanted)
            self._settle()
        elif wanted != self._failed or (serving is None and time.monotonic() >= self._retry_at):
            self._change(serving, wanted)

    def _change(self, serving: ServedModel | None, wanted: ServedGguf) -> None:
        try:
            self._replace(serving, wanted)
        except Exception as error:
            if not isinstance(error, SamqError):
                logger.exception("%s cannot be loaded", wanted)
            self._failed = wanted
            self._retry_at = time.monotonic() + self._wait_s
            self._wait_s = min(2 * self._wait_s, _MOST_WAIT_S)
            self._metrics.reloads.labels("failure").inc()
            self._metrics.reload_failed.set(1)
            keeps = self._engine.model
            self._report(f"{wanted} is not served: {error}" + (f"; {keeps.gguf} keeps serving" if keeps else ""))
        else:
            self._metrics.reloads.labels("success").inc()
            logger.info("%s serves", wanted)
            self._settle()

    def _replace(self, serving: ServedModel | None, wanted: ServedGguf) -> None:
        """Load a model and let it serve; raises if it cannot, and then the old one serves."""
        if serving is None:
            self._engine.exchange(load(wanted, self._settings))
        elif fits_beside(wanted, self._settings):
            new = load(wanted, self._settings)
            try:
                self._compare(serving, new)
            except Exception:
                new.close()
                raise
            self._engine.exchange(new)
            serving.close()
        else:
            self._replace_alone(serving, wanted)

    def _replace_alone(self, serving: ServedModel, wanted: ServedGguf) -> None:
        """Free the old model before the new one is loaded; requests wait meanwhile."""
        logger.warning("%s does not fit beside %s, which is freed first; requests wait", wanted, serving.gguf)
        if self._settings.shadow.prompts:
            logger.warning("the shadow check is left out: it needs both models at once")
        self._engine.exchange(None, more_to_come=True)
        serving.close()
        try:
            self._engine.exchange(load(wanted, self._settings))
        except Exception as failure:
            logger.warning("%s cannot be loaded; %s is loaded again", wanted, serving.gguf)
            try:
                self._engine.exchange(load(serving.gguf, self._settings))
            except Exception as loss:
                self._engine.exchange(None)
                raise SamqError(f"{failure}; and {serving.gguf} cannot be loaded again: {loss}") from failure
            raise

    def _compare(self, serving: ServedModel, new: ServedModel) -> None:
        """The shadow check, if it is asked for; raises SamqError if the models agree too little."""
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
            raise SamqError(
                f"it agrees with {serving.gguf} on {share:.3f} of the tokens of {len(prompts)} recent prompts, and "
                f"{shadow.least_agreement} is asked for; lower least_agreement if that is meant"
            )

    def _settle(self) -> None:
        """What the source names serves."""
        self.problem, self._failed = None, None
        self._wait_s = self._settings.poll_interval_s
        self._metrics.reload_failed.set(0)

    def _report(self, problem: str) -> None:
        """Log a problem once, however often it is met."""
        if problem != self.problem:
            logger.error("%s", problem)
        self.problem = problem


def _same_content(one: ServedGguf, other: ServedGguf) -> bool:
    """Whether there is nothing to load: the same bytes under the same name."""
    return (one.name, one.sha256) == (other.name, other.sha256)
