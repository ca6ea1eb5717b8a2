"""Log probabilities of tokens from the model's logits: before temperature, penalties and grammar."""

from dataclasses import dataclass

import numpy as np

from samq.llamacpp.runtime import Model
from samq.serving.model import Token


@dataclass(frozen=True)
class Alternative:
    """A token that could have been drawn."""

    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was drawn, and the most probable tokens at its place, best first; they may include it."""

    bytes: bytes
    logprob: float
    top: tuple[Alternative, ...]


def token_logprob(model: Model, token: Token, alternatives: int) -> TokenLogprob:
    """Log probabilities (natural) of a token and of the `alternatives` most probable ones."""
    logits = token.logits.astype(np.float64)
    highest = logits.max()
    logprobs = logits - highest - np.log(np.exp(logits - highest).sum())
    count = min(alternatives, len(logprobs))
    best = np.argpartition(-logprobs, count - 1)[:count] if count else np.empty(0, np.int64)
    best = best[np.argsort(-logprobs[best], kind="stable")]
    top = tuple(Alternative(model.piece(int(other)), float(logprobs[other])) for other in best)
    return TokenLogprob(model.piece(token.id), float(logprobs[token.id]), top)
