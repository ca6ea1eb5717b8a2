"""A model that is loaded and can answer: weights, a KV cache for one sequence, the chat template."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.llamacpp.chat import tokenize_chat
from samq.llamacpp.runtime import PHYSICAL_BATCH_TOKENS, Context, Model
from samq.serving.sampling import Sampler, Sampling
from samq.serving.source import ServedGguf


@dataclass(frozen=True)
class Loading:
    """How it was possible to load a model."""

    gpu_layers: int
    context_tokens: int
    kv_type: str
    notes: tuple[str, ...] = ()  # what is not as the settings ask, and why


@dataclass(frozen=True)
class Token:
    """A token that was drawn, and the context that it was drawn from: as it was then until the next token is."""

    id: int
    context: Context

    @property
    def logits(self) -> NDArray[np.float32]:
        """What the token was drawn from, (vocabulary,)."""
        return self.context.last_logits()


class ServedModel:
    """Weights, a context and what is in it.

    Several threads may tokenize; generation is one at a time. `close` waits until nobody uses the model.
    """

    def __init__(self, gguf: ServedGguf, model: Model, context: Context, loading: Loading) -> None:
        """Takes over the model and the context, and frees them in `close`."""
        self.gguf = gguf
        self.loading = loading
        self.model = model
        self._context = context
        self.reused_tokens = 0  # of the last prompt: those that were in the KV cache
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
        """Free the memory when the last use has ended."""
        with self._free:
            self._free.wait_for(lambda: self._users == 0)
            self._resources.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a plain prompt; names of special tokens in it are read as those tokens."""
        tokens: list[int] = self.model.tokenize(text, add_special=True, parse_special=True).tolist()
        return tokens

    def tokenize_chat(self, turns: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation; raises SamqError if there is no template, or it refuses the conversation."""
        tokens: list[int] = tokenize_chat(self.model, turns, dated=True).tolist()
        return tokens

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, stopped: Callable[[], bool] = lambda: False
    ) -> Generator[Token]:
        """Tokens that follow the prompt, without end: the caller stops at the end token, and before the context is full.

        `stopped` is asked between the batches of a long prompt, and ends the generation. The caller must use the model
        (`in_use`), and close the iterator.
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
        cached, self._cached = self._cached, []  # should llama.cpp fail, nothing is known of the cache
        self._context.extend(batch)
        cached.extend(batch)
        self._cached = cached

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Keep what the cache and the prompt begin with; returns how many tokens. The last one is always evaluated."""
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
