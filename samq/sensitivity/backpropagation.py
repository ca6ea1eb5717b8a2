"""Backpropagation over token sequences: each sequence's gradients, reduced to a few numbers a weight.

The labels of the loss are the text's next tokens, or tokens drawn from the model's distribution. The mean of the squared
gradients of the second kind is the true Fisher information. Memory does not hold the gradients of all sequences, so a
function reduces each gradient as soon as it is computed.

All sequences go through one decoder block after another, forward and then backward, so that no more than a block's weights
need to be in memory. The hidden states before each block are kept, and what lies between is computed again on the way back
(Chen et al. 2016, arXiv:1604.06174). Models that do not come apart into blocks go through whole, a batch after another.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch, batches
from samq.errors import SamqError
from samq.progress import Progress, silent
from samq.records import Labels
from samq.sensitivity.blocks import Blocks, Call, main_device
from samq.sensitivity.gpu_memory import needs_gpu_memory
from samq.sensitivity.gradients import PROBE_TOKENS, Batch, SampleGradients
from samq.sensitivity.hidden_states import HiddenStates
from samq.sensitivity.layout import Weight
from samq.sensitivity.offloading import Residence, is_offloaded, values_of
from samq.sensitivity.weight_gradients import Gradients

logger = logging.getLogger(__name__)

LOGITS_AT_ONCE = 2**22  # logits whose probabilities are in memory, in float32, beside all logits

# (the weight's index, gradients of the sequences of a batch, or of some rows of theirs) -> numbers of each sequence,
# (sequences, numbers), in float64, on the gradients' device
Reduce = Callable[[int, Gradients], torch.Tensor]


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
    model.eval()  # no dropout
    sums = _Sums((len(weights), len(tokens), numbers), reduce)
    gradients = SampleGradients(model, weights, sums.receive)
    blocks = blocks_of(model, gradients)
    if blocks is None or not any(map(is_offloaded, model.parameters())):
        probe = torch.arange(PROBE_TOKENS, device=model.device)[None]
        gradients.require_calls(lambda: model(input_ids=probe, use_cache=False), model)
    loss = _Loss(tokens, weights, labelling)
    with gradients:
        if blocks is None:
            _whole(model, gradients, _numbered(tokens, gradients, batch_size), loss, progress)
        else:
            try:
                _ByBlocks(blocks, gradients, _numbered(tokens, gradients, batch_size), loss, progress).run()
            except _OneByOneError:  # found out before the first gradient
                _ByBlocks(blocks, gradients, _numbered(tokens, gradients, 1), loss, progress).run()
    reduced = sums.numbers()
    _check_reduced(reduced, weights, labelling.first_sequence, labelling.purpose)
    return loss.summed, reduced


def blocks_of(model: PreTrainedModel, gradients: SampleGradients) -> Blocks | None:
    """The blocks that the model is measured by, or None."""
    blocks = Blocks.of(model)
    if blocks is not None and (name := gradients.not_hooked_outside(blocks.layers)):
        logger.info("%s is measured whole: the gradient of %s is autograd's own", type(model).__name__, name)
        return None
    return blocks


class _Sums:
    """The numbers of all weights and sequences, added up where the gradients are: copies to the host would stall a GPU."""

    def __init__(self, shape: tuple[int, int, int], reduce: Reduce) -> None:
        self._shape, self._reduce = shape, reduce
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def receive(self, index: int, first: int, gradients: Gradients) -> None:
        """Add what `reduce` makes of some gradients; `first` is the number of the first of their sequences."""
        numbers = self._reduce(index, gradients)
        if numbers.device not in self._on_device:
            self._on_device[numbers.device] = torch.zeros(self._shape, dtype=torch.float64, device=numbers.device)
        self._on_device[numbers.device][index, first : first + len(numbers)] += numbers

    def numbers(self) -> np.ndarray:
        """(weights, sequences, numbers)."""
        parts = [part.cpu().numpy() for part in self._on_device.values()]
        return np.sum(parts, axis=0) if parts else np.zeros(self._shape)


@dataclass(frozen=True)
class _Sequences:
    """Some sequences in one batch, padded to the longest: token ids and mask (sequences, T)."""

    ids: torch.Tensor
    mask: torch.Tensor  # 0 at padding
    batch: Batch

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask."""
        return self.ids.to(device), self.mask.to(device)

    def memory(self) -> AbstractContextManager[None]:
        """Says what does not fit if a GPU runs out of memory."""
        return needs_gpu_memory(
            f"a pass over {len(self.batch.lengths)} sequences of up to {self.batch.longest} tokens",
            "use a smaller batch size or shorter sequences",
        )


class _OneByOneError(Exception):
    """A weight turned out to need batches of one sequence."""


def _numbered(tokens: TokenBatch, gradients: SampleGradients, batch_size: int) -> list[_Sequences]:
    numbered, first = [], 0
    for ids, mask, _ in batches(tokens, 1 if gradients.one_sample_only else batch_size):
        numbered.append(_Sequences(ids, mask, Batch(first, mask.sum(1).tolist())))
        first += len(ids)
    return numbered


class _Loss:
    """The loss of each sequence, and its gradient with respect to the logits."""

    def __init__(self, tokens: TokenBatch, weights: list[Weight], labelling: Labelling) -> None:
        self.summed = np.zeros(len(tokens))  # in nats
        self._tokens, self._weights, self._labelling = tokens, weights, labelling

    def gradient(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        """Gradient of one sequence's summed loss with respect to its logits (T, vocabulary); SamqError if it is not finite."""
        labelling = self._labelling
        sequence = labelling.first_sequence + number
        ids = torch.from_numpy(self._tokens.sequence(number).astype(np.int64))
        labels = ids[1:].to(logits.device) if labelling.labels == "text" else None
        gradient = torch.zeros_like(logits)
        last = len(ids) - 1  # the last position has no next token
        self.summed[number] = _loss_gradient(logits[:last], labels, labelling.stream(sequence), gradient[:last])
        _check_loss(self.summed[number], self._weights, sequence, labelling.purpose)
        return gradient


def _whole(
    model: PreTrainedModel, gradients: SampleGradients, numbered: list[_Sequences], loss: _Loss, progress: Progress
) -> None:
    """Batch after batch through the whole model."""
    for done, sequences in enumerate(numbered):
        batch = sequences.batch
        with sequences.memory(), _deterministic(model.device), gradients.within(model, batch) as backward:
            ids, mask = sequences.on(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            gradient = torch.zeros_like(logits)
            for row, length in enumerate(batch.lengths):
                gradient[row, :length] = loss.gradient(batch.first + row, logits[row, :length].detach())
            backward(logits, gradient)
            del logits, gradient  # the graph, before the next forward pass
        progress(done + 1, len(numbered))


class _ByBlocks:
    """All sequences through one block after another, forward and backward."""

    def __init__(
        self, blocks: Blocks, gradients: SampleGradients, numbered: list[_Sequences], loss: _Loss, progress: Progress
    ) -> None:
        self.blocks, self.gradients, self.numbered, self.loss = blocks, gradients, numbered, loss
        self._progress, self._steps = progress, 0
        self._offloaded = [list(layer.parameters()) for layer in blocks.layers]  # before copies stand for them
        self.device = main_device(blocks.model)
        self._calls: list[list[Call]] = []  # of each batch, for each block
        self._states = HiddenStates(self.device)
        self._slopes: dict[int, torch.Tensor] = {}  # batch -> gradient of the loss with respect to its hidden states

    def run(self) -> None:
        """Hand over all gradients."""
        with self.blocks.resident() as weights, _deterministic(self.device):
            with torch.no_grad():
                self._forward(weights)
            self._turn()
            self._backward(weights)
            self._embed()

    def _forward(self, weights: Residence) -> None:
        for number, sequences in enumerate(self.numbered):
            entered = self.blocks.enter(*sequences.on(self.device))
            self._states.put(0, number, entered.hidden)
            self._calls.append(entered.calls)
        self._states.close(0)
        last = len(self.blocks) - 1
        for block in range(len(self.blocks)):
            with weights.block(block, min(block + 1, last)) as layer:
                self._require_calls(block, layer, weights.devices[block])
                for number, sequences in enumerate(self.numbered):
                    hidden = self._states.get(block, number, weights.devices[block])
                    with sequences.memory():
                        self._states.put(block + 1, number, self.blocks.run(block, hidden, self._calls[number][block]))
                    self._tell()
            self._states.close(block + 1)

    def _require_calls(self, block: int, layer: nn.Module, device: torch.device) -> None:
        """Find out which weights of a block are used without their module, if it was not in memory before."""
        if any(map(is_offloaded, self._offloaded[block])):
            hidden = self._states.get(block, 0, device)
            self.gradients.require_calls(lambda: self.blocks.run(block, hidden, self._calls[0][block]), layer)
            if self.gradients.one_sample_only and len(self.numbered[0].batch.lengths) > 1:
                raise _OneByOneError

    def _turn(self) -> None:
        """From the last hidden states to the loss and back, a sequence at a time: logits are large."""
        last = len(self.blocks)
        for number, sequences in enumerate(self.numbered):
            states = self._states.get(last, number, self.device)
            slopes = torch.zeros_like(states)
            for row, length in enumerate(sequences.batch.lengths):
                hidden = states[row : row + 1, :length].requires_grad_()
                batch = Batch(sequences.batch.first + row, [length])
                with sequences.memory(), self.gradients.within(None, batch) as backward:
                    logits = self.blocks.logits(hidden, sequences.ids[row : row + 1, :length].to(self.device))
                    backward(logits, self.loss.gradient(batch.first, logits[0].detach())[None])
                    del logits
                slopes[row, :length] = _gradient(hidden)[0]
            self._slopes[number] = slopes
        self._states.drop(last)

    def _backward(self, weights: Residence) -> None:
        for block in reversed(range(len(self.blocks))):
            with weights.block(block, block - 1) as layer:
                for number, sequences in enumerate(self.numbered):
                    hidden = self._states.get(block, number, weights.devices[block]).requires_grad_()
                    with sequences.memory(), self.gradients.within(layer, sequences.batch) as backward:
                        output = self.blocks.run(block, hidden, self._calls[number][block])
                        backward(output, self._slopes[number].to(output.device))
                        del output
                    self._slopes[number] = _gradient(hidden)
                    self._tell()
            self._states.drop(block)

    def _embed(self) -> None:
        for number, sequences in enumerate(self.numbered):
            with self.gradients.within(None, sequences.batch) as backward:
                hidden = self.blocks.enter(*sequences.on(self.device)).hidden
                backward(hidden, self._slopes.pop(number).to(hidden.device))

    def _tell(self) -> None:
        self._steps += 1
        self._progress(self._steps, 2 * len(self.blocks) * len(self.numbered))


def _gradient(hidden: torch.Tensor) -> torch.Tensor:
    """What backward has left in a leaf."""
    assert hidden.grad is not None
    return hidden.grad


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


def _check_loss(loss: float, weights: list[Weight], sequence: int, purpose: str) -> None:
    if not np.isfinite(loss):
        broken = [weight.name for weight in weights if not torch.isfinite(values_of(weight.parameter)).all()]
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
