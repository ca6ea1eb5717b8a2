"""Backpropagation over token sequences: each sequence's gradients, reduced to a few numbers a weight.

The labels of the loss are the text's next tokens, or tokens drawn from the model's distribution. The mean of the squared
gradients of the second kind is the true Fisher information. Memory does not hold the gradients of all sequences, so a
function reduces each gradient as soon as it is computed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch, batches
from samq.errors import SamqError
from samq.progress import Progress, silent
from samq.records import Labels
from samq.sensitivity.gpu_memory import needs_gpu_memory
from samq.sensitivity.gradients import SampleGradients
from samq.sensitivity.layout import Weight

LOGITS_AT_ONCE = 2**22  # logits whose probabilities are in memory, in float32, beside all logits

# (the weight's index, first row, those rows of one sequence's gradient in float32) -> numbers in float64, on the
# gradient's device. The rows of stacked experts are numbered through. The function may overwrite the gradient.
Reduce = Callable[[int, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Labelling:
    """The labels of the loss, and what the sequences are for.

    A sequence's labels are drawn from a random stream of its own, which depends on `purpose`, `seed` and the sequence's
    number, and not on the batches.
    """

    labels: Labels = "text"  # next tokens of the text, or drawn from the model's distribution at the same positions
    seed: int = 0  # of the drawn labels
    first_sequence: int = 0  # number of the first of the sequences among all that are measured
    purpose: Literal["calibration", "check"] = "calibration"

    def stream(self, sequence: int) -> np.random.Generator:
        """The random stream of a sequence, by its number; a check's differ from all of the calibration's."""
        key = (1,) if self.purpose == "check" else ()
        return np.random.default_rng(np.random.SeedSequence((self.seed, sequence), spawn_key=key))


def backpropagate(
    model: PreTrainedModel,
    tokens: TokenBatch,
    weights: list[Weight],
    reduce: Reduce,
    *,
    numbers: int,
    labelling: Labelling,
    batch_size: int = 1,
    progress: Progress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce the gradient of each sequence's summed loss to `numbers` numbers a weight.

    Args:
        model: in any floating-point type, on any device; the function puts it in eval mode.
        tokens: sequences of at least two tokens.
        weights: the model's, from `samq.sensitivity.layout.weights_of`.
        reduce: computes `numbers` numbers from some rows of a gradient. The numbers of all rows are added up.
        numbers: how many numbers `reduce` returns.
        labelling: the labels of the loss.
        batch_size: sequences a pass. For models with weights outside linear layers (GPT-2, mixtures of experts) it is 1.
        progress: told of the sequences that are done.

    Returns:
        The summed losses in nats, (N,), and the numbers, (weights, N, numbers), both in float64.

    Raises:
        SamqError: NaN or Inf in a loss or in the numbers (names the tensor and the sequence), or too little GPU memory.
    """
    losses = np.zeros(len(tokens))
    reduced = np.zeros((len(weights), len(tokens), numbers))
    devices = {weight.parameter.device for weight in weights}  # several if the model is spread over GPUs

    def receive(index: int, sample: int, row: int, gradient: torch.Tensor) -> None:
        batch[gradient.device][index, sample] += reduce(index, row, gradient)

    model.eval()  # no dropout
    gradients = SampleGradients(model, weights, receive)
    if gradients.one_sample_only:
        batch_size = 1
    done = 0
    with gradients:
        for ids, mask, targets in batches(tokens, batch_size):
            lengths = mask.sum(1).tolist()
            here = slice(done, done + len(lengths))
            first = labelling.first_sequence + done
            streams = [labelling.stream(first + row) for row in range(len(lengths))]
            # On the devices until the batch ends: to copy each gradient's numbers to the host would stall a GPU.
            batch = {
                device: torch.zeros(len(weights), len(lengths), numbers, dtype=torch.float64, device=device)
                for device in devices
            }
            with needs_gpu_memory(
                f"a pass over {len(lengths)} sequences of up to {max(lengths)} tokens",
                "use a smaller batch size or shorter sequences",
            ):
                text_labels = targets if labelling.labels == "text" else None
                losses[here] = _backward(model, gradients, ids, mask, text_labels, streams)
            _check_losses(losses[here], weights, first, labelling.purpose)
            reduced[:, here] = np.sum([part.cpu().numpy() for part in batch.values()], axis=0)
            _check_reduced(reduced[:, here], weights, first, labelling.purpose)
            done = here.stop
            progress(done, len(tokens))
    return losses, reduced


def _backward(
    model: PreTrainedModel,
    gradients: SampleGradients,
    ids: torch.Tensor,
    mask: torch.Tensor,
    targets: torch.Tensor | None,
    streams: list[np.random.Generator],
) -> list[float]:
    """Run one batch forward, and backward if all losses are finite; returns each sequence's summed loss in nats.

    The graph, with all that the hooks keep, is freed when this function returns, before the next forward pass.
    """
    lengths = mask.sum(1).tolist()
    with _deterministic(model.device):
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    gradient = torch.zeros_like(logits)
    losses = []
    for row, (length, stream) in enumerate(zip(lengths, streams, strict=True)):
        label = None if targets is None else targets[row, 1:length].to(logits.device)
        here = row, slice(length - 1)  # the last position has no next token
        losses.append(_loss_gradient(logits.detach()[here], label, stream, gradient[here]))
    if np.isfinite(losses).all():
        with _deterministic(model.device):
            gradients.backward(logits, gradient, lengths)
    return losses


def _loss_gradient(
    logits: torch.Tensor, labels: torch.Tensor | None, stream: np.random.Generator, gradient: torch.Tensor
) -> float:
    """Return the summed negative log likelihood of one sequence in nats, and write its gradient to `gradient`.

    `logits` and `gradient` are (T, vocabulary), `labels` (T,) or None, which draws them from the logits. The gradient with
    respect to the logits is softmax(logits) - onehot(label), computed a few positions at a time: autograd would keep
    float32 copies of all logits.
    """
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    drawn = torch.from_numpy(stream.random(len(logits))).to(logits.device)
    positions = max(1, LOGITS_AT_ONCE // logits.shape[1])
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
    return loss.item()


def _check_losses(losses: np.ndarray, weights: list[Weight], first: int, purpose: str) -> None:
    for sequence, loss in enumerate(losses, start=first):
        if not np.isfinite(loss):
            broken = [weight.name for weight in weights if not torch.isfinite(weight.parameter).all()]
            cause = (
                f"{broken[0]} holds NaN or Inf; use undamaged weights"
                if broken
                else "no weight matrix holds NaN or Inf; load the model in float32, or leave that text out"
            )
            raise SamqError(f"the loss of {purpose} sequence {sequence} is {loss}: {cause}")


def _check_reduced(reduced: np.ndarray, weights: list[Weight], first: int, purpose: str) -> None:
    not_finite = np.argwhere(~np.isfinite(reduced).all(axis=2))
    if len(not_finite):
        # NaN and Inf spread from the output towards the input, so the last weight is the nearest to their source.
        index, sample = not_finite[-1]
        raise SamqError(
            f"the gradient of {weights[index].name} on {purpose} sequence {first + sample} is NaN or Inf; load the model "
            "in float32, or leave that text out"
        )


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Let CUDA add up in a fixed order, as the CPU always does."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # with warnings only, attention would not become deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
