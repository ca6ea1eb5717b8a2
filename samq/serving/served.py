"""A version that serves: its verified files, held open, and an engine that is started again whenever it dies or hangs."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from gguf import TokenType

from samq.errors import SamqError, ToolError
from samq.gguf.file import open_gguf, read_metadata
from samq.llamacpp import fit, gpu
from samq.llamacpp.tokenizing import stack_bytes
from samq.serving.child import Child, StartError
from samq.serving.engine import ENGINES, Loading
from samq.serving.metrics import Metrics
from samq.serving.settings import ServingSettings
from samq.serving.source import HeldFile, ServedGguf
from samq.serving.warmup import warm_up

logger = logging.getLogger(__name__)

_MOST_WAIT_S = 60.0  # between two starts of an engine that ends again and again
_STEADY_S = 60.0  # an engine that has served for so long is started again at once
KV_Q4_WARNING = (
    "a Q4_0 KV cache rounds every key and value to 4 bits, which adds to the error of quantized weights and grows with "
    "the length of the context; the evaluation that chose this model did not measure that error unless its kv_type was "
    "Q4_0 too: prefer Q8_0"
)


class Served:
    """One version, from its first start to `close`. `child` is None while the engine is started again."""

    def __init__(
        self, gguf: ServedGguf, settings: ServingSettings, metrics: Metrics, changed: Callable[[], None]
    ) -> None:
        """Open and verify the files, which can take long; raises SamqError. `changed` is called when `child` has changed."""
        self.gguf = gguf
        self.child: Child | None = None
        self.described: dict[str, Any] = {}  # the model, as the engine lists it
        self.notes: list[str] = []  # how it differs from the settings, each with the reason
        self._settings = settings
        self._metrics = metrics
        self._changed = changed
        self._ended: str | None = None  # how the engine ended, until it runs again
        self._keeping: asyncio.Task[None] | None = None
        self._files = [HeldFile(gguf.path, gguf.sha256)]
        try:
            if gguf.mmproj:
                self._files.append(HeldFile(gguf.mmproj, gguf.mmproj_sha256))
            self._describe()
        except BaseException:
            for file in self._files:
                file.close()
            raise

    def _describe(self) -> None:
        """Read what the file says of itself."""
        gguf, settings = self.gguf, self._settings
        metadata = read_metadata(gguf.path)
        self.vocabulary = (str(metadata.get("tokenizer.ggml.model", "")), str(metadata.get("tokenizer.ggml.pre", "")))
        stack_bytes("", *self.vocabulary)  # refuses a vocabulary that would end the engine
        context = metadata.get(f"{metadata.get('general.architecture')}.context_length", settings.context_tokens)
        self.loading = self._wanted = Loading(min(settings.context_tokens, int(context)), settings.gpu_layers)
        self.printed_ends = _printed_ends(gguf.path, metadata)  # of answers, for engines that would print them
        self._warnings: list[str] = []
        if self.loading.context_tokens < settings.context_tokens:
            self._warnings.append(f"the context is {context} tokens, the length that the model was trained for")
        if "Q4_0" in settings.kv_types:
            self._warnings.append(KV_Q4_WARNING)

    @property
    def problem(self) -> str | None:
        """Why the engine does not run or does not respond; None if it does."""
        if self.child and (silent_s := self.child.silent_s):
            return f"the engine of {self.gguf} has not responded for {silent_s:.0f} s"
        return self._ended

    async def start(self, *, degrade: bool = True) -> None:
        """Start the engine and let it answer the warm-up prompt.

        If there is not enough memory, puts fewer layers on the GPU, then shortens the context; `notes` names each step.
        Without `degrade` raises StartError instead. Raises SamqError if the model cannot be loaded, and Unfit if it does
        not answer sanely.
        """
        least = min(self._wanted.context_tokens, self._settings.least_context_tokens)
        attempts = list(self._wanted.attempts(least, ENGINES[self._settings.engine].fewest_layers))
        notes = list(self._warnings)
        for number, loading in enumerate(attempts, 1):
            try:
                self.child = await self._start_child(loading)
            except StartError as error:
                if not error.out_of_memory or not degrade or number == len(attempts):
                    raise
                smaller = attempts[number]
                layers = "as many layers as fit" if smaller.gpu_layers is None else f"{smaller.gpu_layers} layers"
                notes.append(f"{error}; trying {layers} on the GPU and a context of {smaller.context_tokens} tokens")
            else:
                self.loading, self.notes = loading, notes
                on_gpu = self.child.layers
                if on_gpu and loading.gpu_layers is None and 0 < on_gpu[0] < on_gpu[1]:
                    self.notes.append(f"{on_gpu[0]} of {on_gpu[1]} layers are on the GPU: its memory holds no more")
                break
        for note in self.notes:
            logger.warning("%s: %s", self.gguf, note)
        self._keeping = asyncio.create_task(self._keep())

    def identity(self) -> dict[str, str]:
        """Headers that name the version."""
        gguf = self.gguf
        identity = {"model": gguf.name, "version": gguf.version, "sha256": gguf.sha256, "plan": gguf.plan_digest}
        return {f"x-samq-{name}": value for name, value in identity.items() if value}

    @property
    def gpu_layers(self) -> int | None:
        """Layers on the GPU; None if the engine does not say."""
        return self.child.layers[0] if self.child and self.child.layers else self.loading.gpu_layers

    async def pause(self) -> None:
        """End the engine; `start` starts it again."""
        if self._keeping:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        child, self.child = self.child, None
        if child:
            await child.stop()

    async def close(self) -> None:
        """End the engine and let go of the files."""
        await self.pause()
        files, self._files = self._files, []
        for file in files:
            file.close()

    async def _start_child(self, loading: Loading) -> Child:
        """An engine that has answered the warm-up prompt, and that has read the verified files and nothing else."""
        for file in self._files:
            await asyncio.to_thread(file.verify)
        model, mmproj = self._files[0], self._files[1] if len(self._files) > 1 else None
        child = Child(model, mmproj, self.gguf.name, loading, self._settings, self.printed_ends)
        try:
            self.described = await child.until_ready()
            child.identity = self.identity
            for file in self._files:
                await asyncio.to_thread(file.verify)
            async with asyncio.timeout(self._settings.request_timeout_s):
                await warm_up(child, str(self.gguf), self._settings)
        except BaseException as error:
            await child.stop()
            if isinstance(error, TimeoutError):
                raise StartError(f"{self.gguf} did not answer the warm-up prompt in request_timeout_s") from error
            raise
        return child

    async def _keep(self) -> None:
        """Start the engine again whenever it ends, with longer and longer waits if it ends again and again."""
        wait = 0.0
        while True:
            assert self.child
            began = asyncio.get_running_loop().time()
            await self.child.until_ended()
            lost, self.child = self.child, None
            self._ended = f"the engine of {self.gguf} {lost.end}; it is started again"
            self._metrics.restarts.labels("hung" if lost.killed_for else "died").inc()
            logger.error("%s", self._ended)
            self._changed()
            await lost.stop()
            if asyncio.get_running_loop().time() - began > _STEADY_S:
                wait = 0.0
            while self.child is None:
                await asyncio.sleep(wait)
                wait = min(max(1.0, 2 * wait), _MOST_WAIT_S)
                try:
                    self.child = await self._start_child(self.loading)
                except Exception as error:
                    self._ended = f"cannot start the engine of {self.gguf} again: {error}; trying again in {wait:g} s"
                    logger.error("%s", self._ended, exc_info=not isinstance(error, SamqError))
            self._ended = None
            logger.info("the engine of %s serves again", self.gguf)
            self._changed()


def _printed_ends(gguf: Path, metadata: dict[str, Any]) -> tuple[str, ...]:
    """The texts of end tokens that the file does not call control tokens: llama.cpp would end answers with them."""
    fields = open_gguf(gguf).fields
    if "tokenizer.ggml.token_type" not in fields:
        return ()
    types = fields["tokenizer.ggml.token_type"].contents()
    ids = {metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")}
    printed = sorted(i for i in ids if isinstance(i, int) and i < len(types) and types[i] != TokenType.CONTROL)
    return tuple(fields["tokenizer.ggml.tokens"].contents()[i] for i in printed)


def fits_beside(served: Served, settings: ServingSettings) -> bool:
    """Whether a model fits into the memory that is free now, by llama.cpp's own plan; if that is unknown, no.

    Takes a moment, and may be called in a thread.
    """
    keys, values = settings.kv_types
    room = fit.Room(served.loading.context_tokens, settings.parallel, max(keys, values, key=_cache_bits))
    layers = served.loading.gpu_layers
    try:
        planned = fit.planned_by_device(
            served.gguf.path, room, "--gpu-layers", "all" if layers in (None, -1) else str(layers)
        )
    except ToolError as error:
        logger.warning("llama.cpp cannot tell how much memory %s needs: %s", served.gguf, error)
        return False
    host = planned.pop(fit.HOST)
    free = gpu.free_gpu_bytes()
    on_gpus = sum(planned.values()) <= sum(each - fit.SPARE_BYTES for each in free) if planned else True
    return on_gpus and host < psutil.virtual_memory().available


def _cache_bits(kv_type: str) -> int:
    return {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8}.get(kv_type, 5)
