"""A loaded model that can answer: weights, a KV cache for one sequence, and the chat template."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.llamacpp.chat import tokenize_chat
from samq.llamacpp.runtime import PHYSICAL_BATCH_TOKENS, Context, Model
from samq.serving.sampling import Sampler, SamplerSettings
from samq.serving.source import ServedGguf


@dataclass(frozen=True)
class Loading:
    """How a model was loaded."""

    gpu_layers: int
    context_tokens: int
    kv_type: str
    notes: tuple[str, ...] = ()  # differences from the settings, each with the reason


@dataclass(frozen=True)
class Token:
    """A token that was drawn, and its context, which changes when the next token is drawn."""

    id: int
    context: Context

    @property
    def logits(self) -> NDArray[np.float32]:
        """The logits that the token was drawn from, (vocabulary,)."""
        return self.context.last_logits()


class ServedModel:
    """Weights, and a context with the tokens in it.

    Several threads may tokenize at the same time; only one may generate. `close` waits until nobody uses the model.
    """

    def __init__(self, gguf: ServedGguf, model: Model, context: Context, loading: Loading) -> None:
        """Owns the model and the context from now on, and frees them in `close`."""
        self.gguf = gguf
        self.loading = loading
        self.model = model
        self._context = context
        self.reused_tokens = 0  # tokens of the last prompt that were in the KV cache
        self._cached: list[int] = []  # tokens in the KV cache
        self._generating = threading.Lock()
        self._free = threading.Condition()
        self._users = 0
        self._resources = ExitStack()
        self._resources.enter_context(model)
        self._resources.enter_context(context)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the model from being freed."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def acquire(self) -> None:
        """Begin to use the model."""
        with self._free:
            self._users += 1

    def release(self) -> None:
        """End a use."""
        with self._free:
            self._users -= 1
            self._free.notify_all()

    def close(self) -> None:
        """Free the memory after the last use has ended."""
        with self._free:
            self._free.wait_for(lambda: self._users == 0)
            self._resources.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a plain prompt; parses names of special tokens in it."""
        tokens: list[int] = self.model.tokenize_prompt(text, parse_special=True).tolist()
        return tokens

    def tokenize_chat(self, turns: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation; raises SamqError if the model has no template, or if that refuses it."""
        tokens: list[int] = tokenize_chat(self.model, turns, dated=True).tolist()
        return tokens

    def generate(
        self, prompt: Sequence[int], sampling: SamplerSettings, stopped: Callable[[], bool] = lambda: False
    ) -> Generator[Token]:
        """Generate tokens after the prompt, without end: the caller stops at the end token, and before the context is full.

        If `stopped()` is true between two batches, the generation ends. The caller must keep the model in use (`in_use`),
        and close the iterator.
        """
        with self._generating, Sampler(self.model, sampling, self._context.tokens) as sampler:
            self.reused_tokens = self._reuse(prompt)
            pending = list(prompt[self.reused_tokens :])
            while not stopped():
                batch, pending = pending[:PHYSICAL_BATCH_TOKENS], pending[PHYSICAL_BATCH_TOKENS:]
                self._extend(batch)
                if not pending:
                    token = sampler.sample(self._context)
                    yield Token(token, self._context)
                    pending = [token]

    def _extend(self, batch: list[int]) -> None:
        """Append a batch to the cache."""
        cached, self._cached = self._cached, []  # if llama.cpp fails, the content of the cache is unknown
        self._context.extend(batch)
        cached.extend(batch)
        self._cached = cached

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Keep the prefix that cache and prompt share; returns its length. The prompt's last token is always evaluated."""
        same = 0
        for kept, token in zip(self._cached, prompt[:-1], strict=False):
            if kept != token:
                break
            same += 1
        if same and not self._context.forget(0, same):
            same = 0
        if not same:
            self._context.clear()
        self._cached = self._cached[:same]
        return same
