"""How much the loss feels each weight tensor: gradient norms, and the Fisher information that prices a change.

One pass over the calibration sequences gives both. With g the gradient of one sequence's summed loss,

    gradient norm   the founding method: L2 norm of the gradient of the sequence's mean loss, |g| / its label tokens;
                    mean over sequences, and its standard error; divided by the largest it is the score
    fisher          sum over sequences of g^2, over all label tokens, in nats per token per squared weight. Replacing
                    W by W + dW then costs about sum(fisher * dW^2) / 2 in nats per token (the second-order term of
                    the KL divergence, without the terms between weights); true Fisher information with labels drawn
                    from the model, the empirical one with those of the text

Fisher values are averaged over blocks of a row's weights, so that they take a small part of the model's size.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from samq.calibration import TokenBatch, batches
from samq.errors import SamqError
from samq.gradients import SampleGradients
from samq.layout import Weight, weights_of
from samq.progress import Progress, silent
from samq.records import SensitivityMap, TensorSensitivity

Labels = Literal["text", "model"]
LOGITS_AT_ONCE = 2**22  # probabilities held in float32 beside the logits


def measure_sensitivity(
    model: PreTrainedModel,
    tokens: TokenBatch,
    *,
    names: Callable[[str], str | None],
    model_digest: str,
    calibration_digest: str,
    row_orders: Mapping[str, np.ndarray] | None = None,
    batch_size: int = 1,
    labels: Labels = "text",
    second_moment: bool = True,
    block_weights: int = 32,
    seed: int = 0,
    first_sequence: int = 0,
    progress: Progress = silent,
) -> tuple[SensitivityMap, dict[str, np.ndarray] | None]:
    """Measure every weight matrix of a causal LM on the sequences of `tokens`.

    Args:
        model: in any floating type, on any device; gradients are accumulated in float32 or wider.
        tokens: at least two sequences, for a standard error.
        names: torch's parameter name -> GGUF's, see `samq.gguf_file.gguf_names`.
        model_digest: of the ModelSource, kept in the map.
        calibration_digest: of the CalibrationSet, kept in the map.
        row_orders: see `samq.layout.row_orders`; the fisher's rows are put in GGUF's order.
        batch_size: sequences a pass; the figures do not depend on it but for rounding. Models with weights outside
            linear layers (GPT-2, mixtures of experts) are measured one sequence at a time.
        labels: next tokens of the text, or drawn from the model's distribution at the same positions, from a random
            stream of its own for each (seed, sequence).
        second_moment: also return the fisher.
        block_weights: consecutive weights of a row averaged into one value; a row's last block may be shorter.
        seed: of the drawn labels.
        first_sequence: number of the first of these sequences among all that are measured, for the random streams.
        progress: told of sequences done.

    Returns:
        The map, and GGUF name -> fisher in float32, (rows, blocks a row), experts first when stacked; None without
        `second_moment`.

    Raises:
        SamqError: too few sequences, or NaN or Inf in a loss or gradient, with the tensor and the sequence, or too
            little GPU memory.
    """
    if len(tokens) < 2:
        raise SamqError(f"sensitivity needs at least 2 calibration sequences, not {len(tokens)}; give more text")
    weights = weights_of(model, names)
    blocks = _Blocks(weights, len(tokens), block_weights, second_moment, first_sequence)
    losses = np.zeros(len(tokens))
    model.eval()  # no dropout
    gradients = SampleGradients(model, weights, blocks.add)
    if gradients.one_sample_only:
        batch_size = 1
    done = 0
    with gradients:
        for ids, mask, targets in batches(tokens, batch_size):
            lengths = mask.sum(1).tolist()
            here = slice(done, done + len(lengths))
            streams = [np.random.default_rng((seed, first_sequence + row)) for row in range(here.start, here.stop)]
            blocks.start_batch(done, len(lengths))
            try:
                losses[here] = _backward(model, gradients, ids, mask, targets if labels == "text" else None, streams)
            except torch.OutOfMemoryError as error:
                raise SamqError(
                    f"the GPU's memory does not hold a pass over {len(lengths)} sequences of up to {max(lengths)} tokens; "
                    "use a smaller batch size or shorter sequences"
                ) from error
            _check_losses(losses[here], weights, first_sequence + done)
            blocks.end_batch()
            done = here.stop
            progress(done, len(tokens))
    label_tokens = tokens.lengths.astype(np.int64) - 1
    squares = dict(zip((weight.name for weight in weights), blocks.squares, strict=True))
    shapes = {weight.name: weight.shape for weight in weights}
    return (
        SensitivityMap(
            model_digest=model_digest,
            calibration_digest=calibration_digest,
            labels=labels,
            seed=seed,
            sequence_tokens=tuple(label_tokens.tolist()),
            loss_nats=float(losses.sum() / label_tokens.sum()),
            tied_embeddings="output.weight" not in squares,
            block_weights=block_weights if second_moment else None,
            tensors=_sensitivities(shapes, squares, label_tokens, second_moment),
        ),
        blocks.fisher(int(label_tokens.sum()), row_orders or {}) if second_moment else None,
    )


def merge(
    first: tuple[SensitivityMap, Mapping[str, np.ndarray]], more: tuple[SensitivityMap, Mapping[str, np.ndarray]]
) -> tuple[SensitivityMap, dict[str, np.ndarray]]:
    """Two measurements (map, fisher) of one model on different sequences as one, as if all had been measured together."""
    (one, one_fisher), (other, other_fisher) = first, more
    tokens = one.tokens + other.tokens
    squares = {
        name: np.array(tensor.sequence_squares + other.tensors[name].sequence_squares)
        for name, tensor in one.tensors.items()
    }
    shapes = {name: tensor.shape for name, tensor in one.tensors.items()}
    sequence_tokens = one.sequence_tokens + other.sequence_tokens
    whole = one.model_copy(
        update={
            "sequence_tokens": sequence_tokens,
            "loss_nats": (one.loss_nats * one.tokens + other.loss_nats * other.tokens) / tokens,
            "tensors": _sensitivities(shapes, squares, np.array(sequence_tokens), True),
        }
    )
    fisher = {
        name: (blocks * np.float32(one.tokens / tokens) + other_fisher[name] * np.float32(other.tokens / tokens))
        for name, blocks in one_fisher.items()
    }
    return whole, fisher


def _sensitivities(
    shapes: Mapping[str, tuple[int, ...]],
    squares: Mapping[str, np.ndarray],
    label_tokens: np.ndarray,
    second_moment: bool,
) -> dict[str, TensorSensitivity]:
    """GGUF name -> record, from `squares` (sequences,): squared gradient norms of the sequences' summed losses."""
    norms = {name: np.sqrt(values) / label_tokens for name, values in squares.items()}
    largest = max(values.mean() for values in norms.values())
    if not largest:
        raise SamqError("all gradients are zero: the loss does not depend on the weights; check the model's weights")
    return {
        name: TensorSensitivity(
            shape=shape,
            gradient_norm=norms[name].mean(),
            gradient_norm_stderr=norms[name].std(ddof=1) / np.sqrt(len(label_tokens)),
            score=norms[name].mean() / largest,
            fisher=squares[name].sum() / label_tokens.sum() / math.prod(shape) if second_moment else None,
            sequence_squares=tuple(squares[name].tolist()),
        )
        for name, shape in shapes.items()
    }


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


class _Blocks:
    """Sums of squared gradients: of each weight and sequence, and of each block of weights over all sequences."""

    def __init__(
        self, weights: list[Weight], samples: int, block_weights: int, second_moment: bool, first_sequence: int
    ) -> None:
        self.weights = weights
        self.first_sequence = first_sequence
        self.block_weights = block_weights
        self.squares = np.zeros((len(weights), samples))  # of the summed loss, nats^2 per squared weight
        self._devices = {weight.parameter.device for weight in weights}  # several when a model is spread over GPUs
        self._sums: list[torch.Tensor] = []
        if second_moment:
            for weight in weights:
                *rows, columns = weight.shape
                blocks = -(-columns // block_weights)
                self._sums.append(torch.zeros(math.prod(rows), blocks, device=weight.parameter.device))

    def start_batch(self, first: int, samples: int) -> None:
        self._first = first
        # Kept on the devices during a batch: a copy to the host for every gradient would stall a GPU.
        self._batch = {
            device: torch.zeros(len(self.weights), samples, dtype=torch.float64, device=device)
            for device in self._devices
        }

    def add(self, index: int, sample: int, row: int, gradient: torch.Tensor) -> None:
        """Take some rows of the gradient of one sample's summed loss with respect to one weight."""
        # A norm is taken in one pass over the gradient, without a copy; its square is the sum of squares.
        whole = gradient.shape[1] // self.block_weights * self.block_weights
        parts = []
        if whole:
            parts.append(torch.linalg.vector_norm(gradient[:, :whole].unflatten(1, (-1, self.block_weights)), dim=-1))
        if whole < gradient.shape[1]:
            parts.append(torch.linalg.vector_norm(gradient[:, whole:], dim=-1, keepdim=True))
        squares = torch.cat(parts, dim=1).square_()
        self._batch[gradient.device][index, sample] += squares.sum(dtype=torch.float64)
        if self._sums:
            self._sums[index][row : row + len(squares)] += squares

    def end_batch(self) -> None:
        """Keep the batch's sums; raises SamqError if one is not finite."""
        batch = np.sum([part.cpu().numpy() for part in self._batch.values()], axis=0)
        wrong = np.argwhere(~np.isfinite(batch))
        if len(wrong):
            # A bad value spreads from the output towards the input: the last weight is the nearest to its source.
            index, sample = wrong[-1]
            raise SamqError(
                f"the gradient of {self.weights[index].name} on calibration sequence "
                f"{self.first_sequence + self._first + sample} is NaN or Inf; load the model in float32, or leave that "
                "text out"
            )
        self.squares[:, self._first : self._first + batch.shape[1]] = batch

    def fisher(self, label_tokens: int, row_orders: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """GGUF name -> fisher, averaged over blocks, in GGUF's order of rows."""
        result = {}
        for weight, sums in zip(self.weights, self._sums, strict=True):
            *rows, columns = weight.shape
            starts = np.arange(0, columns, self.block_weights)
            sizes = np.minimum(self.block_weights, columns - starts).astype(np.float32)
            values = sums.cpu().numpy() / (sizes * label_tokens)
            if weight.name in row_orders:
                values = values[row_orders[weight.name]]
            result[weight.name] = values.reshape(*rows, -1)
        return result


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
        else:
            label = labels[here, None]
        loss -= logs.gather(1, label).sum(dtype=torch.float64)
        probabilities[torch.arange(len(label)), label[:, 0]] -= 1
        gradient[here] = probabilities
    return loss.item()


def _check_losses(losses: np.ndarray, weights: list[Weight], first: int) -> None:
    for sequence, loss in enumerate(losses, start=first):
        if not np.isfinite(loss):
            broken = [weight.name for weight in weights if not torch.isfinite(weight.parameter).all()]
            cause = (
                f"{broken[0]} holds NaN or Inf; use undamaged weights"
                if broken
                else "no weight matrix holds NaN or Inf; load the model in float32, or leave that text out"
            )
            raise SamqError(f"the loss of calibration sequence {sequence} is {loss}: {cause}")


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


def save_fisher(path: Path, blocks: Mapping[str, np.ndarray]) -> Path:
    """Write GGUF name -> fisher blocks as safetensors: the same values give the same bytes."""
    try:
        save_file({name: np.ascontiguousarray(blocks[name]) for name in sorted(blocks)}, path)
    except (OSError, SafetensorError) as error:
        raise SamqError(f"cannot write {path}: {error}; choose a folder that can be written to") from error
    return path


def load_fisher(path: Path) -> dict[str, np.ndarray]:
    """Read what `save_fisher` wrote; raises SamqError if the file is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SamqError(f"cannot read fisher blocks from {path}: {error}; calibrate again") from error
