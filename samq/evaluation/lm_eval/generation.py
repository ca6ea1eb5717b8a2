"""Continuing many prompts at once: sequences share batches, which is faster than one after the other.

A sequence's tokens do not depend on what shares its batch, except through rounding: batches of another shape may add
in another order, which can change a token where the best two are all but equal. The order of admission is fixed, so
one model on one machine answers the same every time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from samq.errors import SamqError
from samq.evaluation.lm_eval.prefixes import Tokens, common_length
from samq.evaluation.lm_eval.sampling import Sampling, choose
from samq.llamacpp.runtime import Context, Model
from samq.progress import Progress, silent

_PARALLEL = 16  # measured on one core, 135M weights at Q4_K_M, 16 prompts: 1 at a time 20 s, 8: 15 s, 16: 13 s
_WORTH_SHARING = 32  # tokens; fewer are evaluated again sooner than a cache is copied, or a batch run just for them
_GREEDY = Sampling()


@dataclass
class _Sequence:
    """One prompt on its way to an answer; afterwards it stays in the cache until its place is needed."""

    index: int
    prompt: Tokens
    position: int  # of the next token to be decoded
    tokens: list[int]  # to be decoded next: the prompt, afterwards the last token generated
    random: np.random.Generator
    answer: bytes = b""
    generated: int = 0


def generate(
    model: Model,
    prompts: Sequence[Tokens],
    *,
    limit: int,
    finished: Callable[[str], bool],
    sampling: Sampling = _GREEDY,
    kv_type: str = "F16",
    threads: int | None = None,
    progress: Progress = silent,
    failed: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue each prompt, by default with the most probable tokens.

    An answer ends when the model ends it, when `finished(text so far)`, or at `limit` tokens. What a prompt begins with in
    common with one that is in the cache is not evaluated again. What is drawn for a prompt depends on the seed and on its
    place among the prompts, not on what shares its batch.

    A prompt after which logits are not finite, or whose batch llama.cpp fails on, has an empty answer: `failed` is told
    its index and the reason, and the others are answered. Raises SamqError instead if there is no `failed`, and if there
    is no memory.
    """
    longest = max(len(prompt) for prompt in prompts) + limit
    parallel = min(_PARALLEL, len(prompts))
    answers = [""] * len(prompts)
    waiting = deque(enumerate(prompts))
    held: dict[int, _Sequence] = {}  # what the cache holds
    free = list(range(parallel))
    spoilt: list[int] = []  # places whose part of the cache has NaN

    def at_work() -> list[int]:
        return sorted(set(held) - set(free))

    def report() -> None:
        progress(len(prompts) - len(waiting) - len(at_work()), len(prompts))

    def lose(place: int, reason: str) -> None:
        if failed is None:
            raise SamqError(reason)
        failed(held.pop(place).index, reason)
        report()

    with model.context(longest, sequences=parallel, kv_type=kv_type, threads=threads) as context:

        def forget_all() -> None:
            context.clear(values=True)
            held.clear()
            spoilt.clear()
            free[:] = range(parallel)

        while waiting or at_work():
            if spoilt and not at_work():
                forget_all()
            try:
                while waiting and free:
                    index, prompt = waiting[0]
                    place, known = _admit(context, prompt, held, free)
                    waiting.popleft()
                    free.remove(place)
                    random = np.random.default_rng([sampling.seed, index])
                    held[place] = _Sequence(index, prompt, known, prompt[known:].tolist(), random)
                active = [(place, held[place]) for place in at_work()]
                batch = [
                    (token, item.position + offset, place, offset == len(item.tokens) - 1)
                    for place, item in active
                    for offset, token in enumerate(item.tokens)
                ]
                logits = context.decode(*zip(*batch, strict=True))
            except SamqError as error:
                if failed is None:
                    raise
                for place in at_work():
                    lose(place, str(error))
                forget_all()
                continue
            for row, (place, item) in zip(logits, active, strict=True):
                if not np.isfinite(row.max()):  # NaN if one of them is
                    lose(place, f"{model.path} gives logits that are not finite; quantize it again")
                    spoilt.append(place)
                    continue
                token = choose(row, sampling, item.random)
                item.position += len(item.tokens)
                item.tokens = [token]
                item.generated += 1
                item.answer += model.piece(token)
                text = item.answer.decode(errors="ignore")  # a character may still lack its last bytes
                if model.is_end(token) or item.generated == limit or finished(text):
                    answers[item.index] = item.answer.decode(errors="replace")
                    free.append(place)
                    report()
    return answers


def _admit(context: Context, prompt: Tokens, held: dict[int, _Sequence], free: Sequence[int]) -> tuple[int, int]:
    """Choose a free place for a prompt and let it begin with what the cache holds of it; how many tokens that is."""
    # the last token of a prompt is evaluated for each: its logits are wanted
    common = {place: common_length(prompt[:-1], item.prompt[:-1]) for place, item in held.items()}
    source = max(common, key=lambda place: (common[place], place in free), default=None)
    if source is None or common[source] < _WORTH_SHARING:
        context.forget(free[0])
        return free[0], 0
    item, known = held[source], common[source]
    if known - item.position >= _WORTH_SHARING:  # it waits for its first batch itself
        begin = item.position
        context.decode(item.tokens[: known - begin], np.arange(begin, known), source, False)
        item.tokens = item.tokens[known - begin :]
        item.position = known
    known = min(known, item.position)
    if known < _WORTH_SHARING or (context.model.is_recurrent and known < item.position):
        known = 0
    place = source if source in free else free[0]
    if place != source:
        context.forget(place)
        if known:
            context.copy(source, place)
    context.forget(place, known)
    return place, known
