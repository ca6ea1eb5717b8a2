"""Continuing many prompts at once: sequences share batches, which is faster than one after the other.

A sequence's tokens do not depend on what shares its batch, except through rounding: batches of another shape may add
in another order, which can change a token where the best two are all but equal. The order of admission is fixed, so
one model on one machine answers the same every time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samq.evaluation.llama import Model
from samq.evaluation.sampling import Sampling, choose
from samq.progress import Progress, silent

_PARALLEL = 16  # measured on one core, 135M weights at Q4_K_M, 16 prompts: 1 at a time 20 s, 8: 15 s, 16: 13 s
_GREEDY = Sampling()


@dataclass
class _Sequence:
    """One prompt on its way to an answer."""

    index: int
    position: int  # of the next token to be decoded
    tokens: list[int]  # to be decoded next: the prompt, afterwards the last token generated
    random: np.random.Generator
    answer: bytes = b""
    generated: int = 0


def generate(
    model: Model,
    prompts: Sequence[NDArray[np.int32]],
    *,
    limit: int,
    finished: Callable[[str], bool],
    sampling: Sampling = _GREEDY,
    kv_type: str = "F16",
    threads: int | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Continue each prompt, by default with the most probable tokens.

    An answer ends when the model ends it, when `finished(text so far)`, or at `limit` tokens. The tokens that all
    prompts begin with are evaluated once. What is drawn for a prompt depends on the seed and on its place among the
    prompts, not on what shares its batch.
    """
    shared = prompts[0][: _shared_length(prompts)]
    longest = max(len(prompt) for prompt in prompts) + limit
    parallel = min(_PARALLEL, len(prompts))
    answers = [""] * len(prompts)
    waiting = deque(enumerate(prompts))
    free = deque(range(1, parallel + 1))  # sequence 0 keeps the shared beginning
    active: dict[int, _Sequence] = {}
    with model.context(longest, sequences=parallel + 1, kv_type=kv_type, threads=threads) as context:
        if len(shared):
            context.decode(shared, np.arange(len(shared)), 0, False)
        while waiting or active:
            while waiting and free:
                index, prompt = waiting.popleft()
                sequence = free.popleft()
                context.forget(sequence)
                if len(shared):
                    context.copy(0, sequence)
                random = np.random.default_rng([sampling.seed, index])
                active[sequence] = _Sequence(index, len(shared), prompt[len(shared) :].tolist(), random)
            batch = [
                (token, item.position + offset, sequence, offset == len(item.tokens) - 1)
                for sequence, item in active.items()
                for offset, token in enumerate(item.tokens)
            ]
            logits = context.decode(*zip(*batch, strict=True))
            for row, (sequence, item) in zip(logits, list(active.items()), strict=True):
                token = choose(row, sampling, item.random)
                item.position += len(item.tokens)
                item.tokens = [token]
                item.generated += 1
                item.answer += model.piece(token)
                text = item.answer.decode(errors="ignore")  # a character may still lack its last bytes
                if model.is_end(token) or item.generated == limit or finished(text):
                    answers[item.index] = item.answer.decode(errors="replace")
                    del active[sequence]
                    free.append(sequence)
                    progress(len(prompts) - len(waiting) - len(active), len(prompts))
    return answers


def _shared_length(prompts: Sequence[NDArray[np.int32]]) -> int:
    """How many tokens all prompts begin with, short of any prompt's last: each has to have one left to evaluate."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    starts = np.array([prompt[:shortest] for prompt in prompts])
    differs = (starts != starts[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest
