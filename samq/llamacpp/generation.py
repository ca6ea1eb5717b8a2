"""Continues many prompts at the same time: sequences share batches, which is faster than one after the other.

The tokens of a sequence do not depend on the other sequences of its batch, except through rounding. Batches of another shape
may add in another order. That can change a token where the best two are nearly equal. Prompts are admitted in a
fixed order, so one model on one machine gives the same answers every time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.values import logits_not_finite
from samq.llamacpp.fit import Room
from samq.llamacpp.prefixes import Tokens, common_length
from samq.llamacpp.runtime import Context, Model
from samq.llamacpp.sampling import Sampling, choose_token
from samq.progress import Progress, silent

PARALLEL = 16  # measured on one core, 135M weights at Q4_K_M, 16 prompts: 1 at a time 20 s, 8: 15 s, 16: 13 s
_WORTH_SHARING = 32  # tokens; evaluating fewer again is faster than copying a cache or running a batch for them alone
_GREEDY = Sampling()


@dataclass(frozen=True)
class Decoding:
    """How answers are generated, and where they end."""

    limit: int  # tokens of an answer
    finished: Callable[[str], bool]  # whether the text so far is a whole answer
    sampling: Sampling = _GREEDY


@dataclass
class _Sequence:
    """One prompt and its answer so far. A finished sequence stays in the cache until its place is needed."""

    index: int
    prompt: Tokens
    position: int  # of the next token to be decoded
    tokens: list[int]  # to be decoded next: the rest of the prompt, afterwards the last token generated
    random: np.random.Generator
    answer: bytes = b""
    generated: int = 0


def generate(
    model: Model,
    prompts: Sequence[Tokens],
    decoding: Decoding,
    *,
    kv_type: str = "F16",
    threads: int | None = None,
    progress: Progress = silent,
    failed: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue each prompt.

    An answer ends when the model ends it, when `decoding.finished(text so far)`, or at `decoding.limit` tokens. A beginning
    that a prompt shares with one in the cache is not evaluated again. The tokens drawn for a prompt depend on the seed and
    on its index among the prompts, not on the other sequences of its batch.

    A prompt gets an empty answer if its logits are not finite, or if llama.cpp fails on its batch. `failed` then gets its
    index and the reason, and the other prompts are answered. Raises SamqError instead if there is no `failed`, and if
    there is not enough memory.
    """
    room = room_for(prompts, decoding.limit, kv_type)
    with model.context(room.tokens, sequences=room.sequences, kv_type=kv_type, threads=threads) as context:
        return _Generation(context, prompts, decoding, room.sequences, progress, failed).run()


def room_for(prompts: Sequence[Tokens], limit: int, kv_type: str) -> Room:
    """The context in which `generate` continues the prompts by up to `limit` tokens."""
    longest = max(len(prompt) for prompt in prompts) + limit
    return Room(longest, min(PARALLEL, len(prompts)), kv_type)


class _Generation:
    """The prompts of one call of `generate`: those that wait, and those in the cache, each in a place of its own."""

    def __init__(
        self,
        context: Context,
        prompts: Sequence[Tokens],
        decoding: Decoding,
        parallel: int,
        progress: Progress,
        failed: Callable[[int, str], None] | None,
    ) -> None:
        """`parallel` is the number of places in the context's cache."""
        self._context = context
        self._prompts = prompts
        self._decoding = decoding
        self._parallel = parallel
        self._progress = progress
        self._failed = failed
        self._answers = [""] * len(prompts)
        self._waiting = deque(enumerate(prompts))
        self._cached: dict[int, _Sequence] = {}  # by place
        self._free = list(range(parallel))
        self._spoilt: list[int] = []  # places whose part of the cache has NaN

    def run(self) -> list[str]:
        """Generate all answers; one for each prompt, in their order."""
        while self._waiting or self._active_places():
            if self._spoilt and not self._active_places():
                self._clear_cache()
            try:
                self._admit_waiting()
                active = [(place, self._cached[place]) for place in self._active_places()]
                logits = self._decode(active)
            except SamqError as error:
                if self._failed is None:
                    raise
                for place in self._active_places():
                    self._give_up(place, str(error))
                self._clear_cache()
                continue
            for row, (place, sequence) in zip(logits, active, strict=True):
                self._append_token(place, sequence, row)
        return self._answers

    def _active_places(self) -> list[int]:
        """Places whose sequences are not finished."""
        return sorted(set(self._cached) - set(self._free))

    def _report(self) -> None:
        done = len(self._prompts) - len(self._waiting) - len(self._active_places())
        self._progress(done, len(self._prompts))

    def _give_up(self, place: int, reason: str) -> None:
        if self._failed is None:
            raise SamqError(reason)
        self._failed(self._cached.pop(place).index, reason)
        self._report()

    def _clear_cache(self) -> None:
        self._context.clear(values=True)
        self._cached.clear()
        self._spoilt.clear()
        self._free[:] = range(self._parallel)

    def _admit_waiting(self) -> None:
        """Fill the free places with prompts that wait."""
        while self._waiting and self._free:
            index, prompt = self._waiting[0]
            place, known = self._choose_place(prompt)
            self._waiting.popleft()
            self._free.remove(place)
            random = np.random.default_rng([self._decoding.sampling.seed, index])
            self._cached[place] = _Sequence(index, prompt, known, prompt[known:].tolist(), random)

    def _decode(self, active: Sequence[tuple[int, _Sequence]]) -> NDArray[np.float32]:
        """Evaluate the next tokens of the active sequences in one batch; the logits after the last token of each."""
        batch = [
            (token, sequence.position + offset, place, offset == len(sequence.tokens) - 1)
            for place, sequence in active
            for offset, token in enumerate(sequence.tokens)
        ]
        return self._context.decode(*zip(*batch, strict=True))

    def _append_token(self, place: int, sequence: _Sequence, logits: NDArray[np.float32]) -> None:
        """Choose the next token of a sequence, and free its place if that ends the answer."""
        model = self._context.model
        if not np.isfinite(logits.max()):  # NaN if one of them is
            self._give_up(place, logits_not_finite(model.path))
            self._spoilt.append(place)
            return
        token = choose_token(logits, self._decoding.sampling, sequence.random)
        sequence.position += len(sequence.tokens)
        sequence.tokens = [token]
        sequence.generated += 1
        ended = model.is_end(token)
        if not ended:  # an end token is no text, though some files call it normal
            sequence.answer += model.piece(token)
        text = sequence.answer.decode(errors="ignore")  # the last character may still lack bytes
        if ended or sequence.generated == self._decoding.limit or self._decoding.finished(text):
            self._answers[sequence.index] = sequence.answer.decode(errors="replace")
            self._free.append(place)
            self._report()

    def _choose_place(self, prompt: Tokens) -> tuple[int, int]:
        """Choose a free place, and put there what the cache holds of the prompt; the place and how many tokens that is."""
        context, free = self._context, self._free
        # the last token of each prompt is evaluated in any case, for its logits
        common = {place: common_length(prompt[:-1], other.prompt[:-1]) for place, other in self._cached.items()}
        source = max(common, key=lambda place: (common[place], place in free), default=None)
        if source is None or common[source] < _WORTH_SHARING:
            context.forget(free[0])
            return free[0], 0
        other, known = self._cached[source], common[source]
        if known - other.position >= _WORTH_SHARING:  # the other prompt still waits for its first batch
            begin = other.position
            context.decode(other.tokens[: known - begin], np.arange(begin, known), source, False)
            other.tokens = other.tokens[known - begin :]
            other.position = known
        known = min(known, other.position)
        if known < _WORTH_SHARING or (context.model.is_recurrent and known < other.position):
            known = 0
        place = source if source in free else free[0]
        if place != source:
            context.forget(place)
            if known:
                context.copy(source, place)
        context.forget(place, known)
        return place, known
