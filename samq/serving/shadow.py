"""The shadow check: how far a new model answers recent prompts as the one that serves does."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing

from samq.serving.model import ServedModel
from samq.serving.refusal import Refused
from samq.serving.sampling import Sampling

Tokenize = Callable[[ServedModel], list[int]]


class RecentPrompts:
    """The newest prompts, in memory only, as what tokenizes them for any model."""

    def __init__(self, count: int) -> None:
        """Keep `count` of them; none if 0."""
        self._prompts: deque[Tokenize] = deque(maxlen=count)

    def add(self, tokenize: Tokenize) -> None:
        """Remember a prompt, and forget the oldest if there are too many."""
        self._prompts.append(tokenize)

    def newest(self) -> list[Tokenize]:
        """Those that are kept, oldest first."""
        return list(self._prompts)


def agreement(old: ServedModel, new: ServedModel, prompts: Sequence[Tokenize], tokens: int) -> float | None:
    """Share of tokens that two models agree on, greedy and up to their first difference in each answer.

    The mean over prompts of (length of the common beginning / length of the longer answer); None if no prompt fits
    into both contexts. Answers are compared as bytes, so the two may have different vocabularies; `old` may be
    serving meanwhile: each answer waits for its turn.
    """
    shares = []
    for tokenize in prompts:
        answers = [_answer(model, tokenize, tokens) for model in (old, new)]
        first, second = answers
        if first is None or second is None:
            continue
        longest = max(len(first), len(second))
        same = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(map(len, (first, second)))
        )
        shares.append(same / longest if longest else 1.0)
    return sum(shares) / len(shares) if shares else None


def _answer(model: ServedModel, tokenize: Tokenize, tokens: int) -> list[bytes] | None:
    """The pieces of a greedy answer of at most `tokens`; None if the prompt does not fit."""
    pieces: list[bytes] = []
    with model.in_use():
        try:
            prompt = tokenize(model)
        except Refused:
            return None
        if not prompt or len(prompt) + tokens > model.loading.context_tokens:
            return None
        with closing(model.generate(prompt, Sampling(temperature=0))) as generated:
            for token in generated:
                if model.model.is_end(token.id):
                    break
                pieces.append(model.model.piece(token.id))
                if len(pieces) == tokens:
                    break
    return pieces
