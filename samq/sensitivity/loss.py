"""The loss that gradients are taken of: labels from the text, or drawn from the model's distribution."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.records import Labels
from samq.sensitivity.layout import Weight
from samq.sensitivity.offloading import values_of

# Logits whose probabilities are in memory, in float32, beside all logits: few for the CPU's cache, more for a GPU's cores
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**25}


@dataclass(frozen=True)
class Labelling:
    """The labels of the loss, and what the sequences are for.

    A sequence's labels are drawn from a random stream of its own. It depends on `purpose`, `seed` and the sequence's number,
    and not on the batches.
    """

    labels: Labels = "text"  # next tokens of the text, or drawn from the model's distribution at the same positions
    seed: int = 0  # of the drawn labels
    first_sequence: int = 0  # number of the first of the sequences among all that are measured
    purpose: Literal["calibration", "check"] = "calibration"

    def stream(self, sequence: int) -> np.random.Generator:
        """The random stream of a sequence, by its number; a check's differ from all of the calibration's."""
        key = (1,) if self.purpose == "check" else ()
        return np.random.default_rng(np.random.SeedSequence((self.seed, sequence), spawn_key=key))


class Loss:
    """The loss of each sequence, and its gradient with respect to the logits."""

    def __init__(self, tokens: TokenBatch, weights: list[Weight], labelling: Labelling) -> None:
        self._tokens, self._weights, self._labelling = tokens, weights, labelling
        self._summed: dict[int, torch.Tensor] = {}  # on the device: to ask for each would stall it

    def gradient(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        """Gradient of one sequence's summed loss with respect to its logits (T, vocabulary)."""
        labelling = self._labelling
        ids = torch.from_numpy(self._tokens.sequence(number).astype(np.int64))
        labels = ids[1:].to(logits.device) if labelling.labels == "text" else None
        gradient = torch.zeros_like(logits)
        last = len(ids) - 1  # the last position has no next token
        stream = labelling.stream(labelling.first_sequence + number)
        self._summed[number] = _loss_gradient(logits[:last], labels, stream, gradient[:last])
        return gradient

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` takes."""
        return {f"loss.{number}": loss for number, loss in self._summed.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Have the losses that `state` gave, in another process perhaps."""
        losses = {name.split(".")[1]: loss for name, loss in state.items() if name.startswith("loss.")}
        self._summed = {int(number): loss for number, loss in losses.items()}

    def summed(self) -> np.ndarray:
        """Each sequence's so far, in nats; SamqError if one is not finite."""
        numbers = sorted(self._summed)
        self.require_finite(numbers)
        return np.array([self._summed[number].item() for number in numbers])

    def require_finite(self, numbers: Iterable[int]) -> None:
        """Raise SamqError if the loss of one of these sequences is not finite."""
        for number in numbers:
            sequence = self._labelling.first_sequence + number
            _check_loss(self._summed[number].item(), self._weights, sequence, self._labelling.purpose)


def _loss_gradient(
    logits: torch.Tensor, labels: torch.Tensor | None, stream: np.random.Generator, gradient: torch.Tensor
) -> torch.Tensor:
    """Return the summed negative log likelihood of one sequence in nats, in float64, and write its gradient to `gradient`.

    `logits` and `gradient` are (T, vocabulary), `labels` (T,) or None, which draws them from the logits. The gradient with
    respect to the logits is softmax(logits) - onehot(label). It is computed a few positions at a time, since autograd would
    keep float32 copies of all logits.
    """
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    drawn = torch.from_numpy(stream.random(len(logits))).to(logits.device)
    positions = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[1])
    for first in range(0, len(logits), positions):
        here = slice(first, first + positions)
        logs = torch.log_softmax(logits[here].float(), dim=-1)
        probabilities = logs.exp()
        if labels is None:
            # In float64, so that the draw almost never depends on rounding. The last sum is 1 up to rounding.
            sums = probabilities.cumsum(-1, dtype=torch.float64)
            label = torch.searchsorted(sums, drawn[here, None] * sums[:, -1:], right=True)
            label.clamp_(max=sums.shape[1] - 1)  # NaN logits give a label out of range; the loss is NaN then too
        else:
            label = labels[here, None]
        loss -= logs.gather(1, label).sum(dtype=torch.float64)
        probabilities[torch.arange(len(label)), label[:, 0]] -= 1
        gradient[here] = probabilities
    return loss


def _check_loss(loss: float, weights: list[Weight], sequence: int, purpose: str) -> None:
    if not np.isfinite(loss):
        broken = [weight.name for weight in weights if not torch.isfinite(values_of(weight.parameter)).all()]
        cause = (
            f"{broken[0]} holds NaN or Inf; use undamaged weights"
            if broken
            else "no weight matrix holds NaN or Inf; load the model in float32, or leave that text out"
        )
        raise SamqError(f"the loss of {purpose} sequence {sequence} is {loss}: {cause}")
