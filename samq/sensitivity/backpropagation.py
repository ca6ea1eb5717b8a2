"""Passes over token sequences: every sequence's loss taken back to the weights, and numbers made of its gradients.

The loss is that of the text's own next tokens, or of labels drawn from the model's distribution: the true Fisher
information is the mean of the second kind's squared gradients. Gradients are too many to be kept, so a function reduces
them to a few numbers a weight and sequence as they come.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch, batches
from samq.errors import SamqError
from samq.progress import Progress, silent
from samq.sensitivity.gpu_memory import needs_gpu_memory
from samq.sensitivity.gradients import SampleGradients
from samq.sensitivity.layout import Weight

Labels = Literal["text", "model"]
LOGITS_AT_ONCE = 2**22  # probabilities held in float32 beside the logits

# (weight's index, first row, those rows of one sequence's gradient in float32) -> numbers in float64, on the gradient's
# device; stacked experts' rows follow one another. The gradient may be overwritten after the call.
Reduce = Callable[[int, int, torch.Tensor], torch.Tensor]


def backpropagate(
    model: PreTrainedModel,
    tokens: TokenBatch,
    weights: list[Weight],
    reduce: Reduce,
    *,
    numbers: int,
    labels: Labels,
    stream: Callable[[int], np.random.Generator],
    text: str,
    first_sequence: int = 0,
    batch_size: int = 1,
    progress: Progress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce the gradients of every sequence's summed loss to `numbers` numbers a weight.

    Args:
        model: in any floating type, on any device; it is put in eval mode.
        tokens: sequences of at least two tokens.
        weights: of the model, see `samq.sensitivity.layout.weights_of`.
        reduce: makes `numbers` numbers of some rows of a gradient; those of all rows are added up.
        numbers: of each weight and sequence.
        labels: next tokens of the text, or drawn from the model's distribution at the same positions.
        stream: a sequence's number -> the random stream that its labels are drawn from, the same in any batch.
        text: what the sequences are, for messages: `calibration`.
        first_sequence: number of the first of these sequences, for their streams and for messages.
        batch_size: sequences a pass. Models with weights outside linear layers (GPT-2, mixtures of experts) are taken
            one sequence at a time.
        progress: told of sequences done.

    Returns:
        Summed losses in nats, (N,), and the numbers, (weights, N, numbers), in float64.

    Raises:
        SamqError: NaN or Inf in a loss or in the numbers, with the tensor and the sequence, or too little GPU memory.
    """
    losses = np.zeros(len(tokens))
    reduced = np.zeros((len(weights), len(tokens), numbers))
    devices = {weight.parameter.device for weight in weights}  # several when a model is spread over GPUs

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
            streams = [stream(first_sequence + row) for row in range(here.start, here.stop)]
            # Kept on the devices during a batch: a copy to the host for every gradient would stall a GPU.
            batch = {
                device: torch.zeros(len(weights), len(lengths), numbers, dtype=torch.float64, device=device)
                for device in devices
            }
            with needs_gpu_memory(
                f"a pass over {len(lengths)} sequences of up to {max(lengths)} tokens",
                "use a smaller batch size or shorter sequences",
            ):
                losses[here] = _backward(model, gradients, ids, mask, targets if labels == "text" else None, streams)
            _check_losses(losses[here], weights, first_sequence + done, text)
            reduced[:, here] = np.sum([part.cpu().numpy() for part in batch.values()], axis=0)
            _check_reduced(reduced[:, here], weights, first_sequence + done, text)
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
    """One batch's forward pass, and backward if all losses are finite; returns each sequence's summed loss in nats.

    The graph, with all that the hooks keep, dies with this function's frame, before the next forward pass.
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
    """Summed negative log likelihood of one sequence, in nats; its gradient by the logits is written to `gradient`.

    `logits` and `gradient` are (T, vocabulary), `labels` (T,) or None: drawn from the logits. The gradient is
    softmax(logits) - onehot(label), made a few positions at a time: autograd would keep float32 copies of all.
    """
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    drawn = torch.from_numpy(stream.random(len(logits))).to(logits.device)
    positions = max(1, LOGITS_AT_ONCE // logits.shape[1])
    for first in range(0, len(logits), positions):
        here = slice(first, first + positions)
        logs = torch.log_softmax(logits[here].float(), dim=-1)
        probabilities = logs.exp()
        if labels is None:
            # In float64, so that the draw hardly ever depends on rounding. The last sum is 1 but for rounding.
            sums = probabilities.cumsum(-1, dtype=torch.float64)
            label = torch.searchsorted(sums, drawn[here, None] * sums[:, -1:], right=True)
            label.clamp_(max=sums.shape[1] - 1)  # where logits are NaN there is no such label; the loss will tell
        else:
            label = labels[here, None]
        loss -= logs.gather(1, label).sum(dtype=torch.float64)
        probabilities[torch.arange(len(label)), label[:, 0]] -= 1
        gradient[here] = probabilities
    return loss.item()


def _check_losses(losses: np.ndarray, weights: list[Weight], first: int, text: str) -> None:
    for sequence, loss in enumerate(losses, start=first):
        if not np.isfinite(loss):
            broken = [weight.name for weight in weights if not torch.isfinite(weight.parameter).all()]
            cause = (
                f"{broken[0]} holds NaN or Inf; use undamaged weights"
                if broken
                else "no weight matrix holds NaN or Inf; load the model in float32, or leave that text out"
            )
            raise SamqError(f"the loss of {text} sequence {sequence} is {loss}: {cause}")


def _check_reduced(reduced: np.ndarray, weights: list[Weight], first: int, text: str) -> None:
    wrong = np.argwhere(~np.isfinite(reduced).all(axis=2))
    if len(wrong):
        # A bad value spreads from the output towards the input: the last weight is the nearest to its source.
        index, sample = wrong[-1]
        raise SamqError(
            f"the gradient of {weights[index].name} on {text} sequence {first + sample} is NaN or Inf; load the model "
            "in float32, or leave that text out"
        )


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Have CUDA add up in a fixed order; the CPU always does."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # not by warnings only: attention would then stay as it is
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
