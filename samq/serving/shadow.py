"""The shadow check: how much a new model's answers to recent prompts agree with those of the served model."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing

from samq.serving.model import ServedModel
from samq.serving.refusal import Refused
from samq.serving.sampling import SamplerSettings

Tokenize = Callable[[ServedModel], list[int]]


class RecentPrompts:
    """The newest prompts, in memory only, each as a function that tokenizes it for any model."""

    def __init__(self, count: int) -> None:
        """Keep at most `count` prompts."""
        self._prompts: deque[Tokenize] = deque(maxlen=count)

    def add(self, tokenize: Tokenize) -> None:
        """Add a prompt, and drop the oldest if there are too many."""
        self._prompts.append(tokenize)

    def newest(self) -> list[Tokenize]:
        """The kept prompts, oldest first."""
        return list(self._prompts)


def token_agreement(old: ServedModel, new: ServedModel, prompts: Sequence[Tokenize], tokens: int) -> float | None:
    """Share of tokens that two models agree on, with greedy decoding and up to their first difference in each answer.

    It is the mean over prompts of (length of the common prefix / length of the longer answer), and None if no prompt fits
    into both contexts. Answers are compared as bytes, so the two models may have different vocabularies. `old` may serve
    meanwhile: each answer waits for its turn.
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
        with closing(model.generate(prompt, SamplerSettings(temperature=0))) as generated:
            for token in generated:
                if model.model.is_end(token.id):
                    break
                pieces.append(model.model.piece(token.id))
                if len(pieces) == tokens:
                    break
    return pieces
