"""Choice of the next token from the logits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0, otherwise a draw from the softmax at that temperature, cut to `top_k` and `top_p`."""

    temperature: float = 0.0
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # only the most probable tokens whose probabilities add up to this
    seed: int = 0


def choose_token(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """Choose a token from logits shaped (vocabulary,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    if sampling.top_k or sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")[: sampling.top_k or None]
        before = weights[order].cumsum() - weights[order]
        kept = order[before < sampling.top_p * weights[order].sum()]
        return int(random.choice(kept, p=weights[kept] / weights[kept].sum()))
    return int(random.choice(len(weights), p=weights / weights.sum()))
