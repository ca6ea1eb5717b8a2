"""Sensitivity of the loss to each weight tensor: gradient norms, and the Fisher information that prices a change.

One pass over the calibration sequences measures both. With g the gradient of one sequence's summed loss:

    gradient norm   the threshold method's measure. It is the L2 norm of the gradient of the sequence's mean loss, |g| /
                    its label tokens. SAMQ keeps the mean over sequences, with its standard error. The score is the norm
                    divided by the model's largest.
    fisher          the sum over sequences of g^2, divided by all label tokens, in nats per token per squared weight.
                    Replacing W by W + dW costs about sum(fisher * dW^2) / 2 nats per token. That is the second-order
                    term of the KL divergence, without the terms between weights. Labels drawn from the model give the true
                    Fisher information, labels of the text the empirical one.

Of the Fisher information SAMQ keeps the means over rows and over columns (samq.sensitivity.fisher).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.progress import Progress, silent
from samq.records import SensitivityMap, TensorSensitivity
from samq.sensitivity.backpropagation import backpropagate
from samq.sensitivity.fisher import Fisher
from samq.sensitivity.layout import GgufLayout, Weight
from samq.sensitivity.loss import Labelling
from samq.sensitivity.memory import UNLIMITED, Memory
from samq.sensitivity.reduction import Reduced
from samq.sensitivity.weight_gradients import Gradients


@dataclass(frozen=True)
class Origin:
    """Digests of what a sensitivity map is measured on, which the map records."""

    model_digest: str  # of the ModelSource
    calibration_digest: str  # of the CalibrationSet


def measure_sensitivity(
    model: PreTrainedModel,
    tokens: TokenBatch,
    layout: GgufLayout,
    origin: Origin,
    *,
    labelling: Labelling,
    batch_size: int = 1,
    memory: Memory = UNLIMITED,
    progress: Progress = silent,
) -> tuple[SensitivityMap, dict[str, Fisher]]:
    """Measure every weight matrix of a causal LM on the sequences of `tokens`.

    Args:
        model: in any floating-point type, on any device; gradients are added up in float32 or wider.
        tokens: at least two sequences, for a standard error.
        layout: the model's weights as its GGUF has them.
        origin: digests for the map.
        labelling: the labels of the loss.
        batch_size: sequences a pass, which changes the figures by rounding only. For models with weights outside linear
            layers and experts (GPT-2) it is 1.
        memory: what it may use.
        progress: told of the blocks that are done, there and back.

    Returns:
        The map, and GGUF name -> Fisher information.

    Raises:
        SamqError: too few sequences, NaN or Inf in a loss or gradient (names the tensor and the sequence), or too little
            GPU memory.
    """
    if len(tokens) < 2:
        raise SamqError(f"sensitivity needs at least 2 calibration sequences, not {len(tokens)}; give more text")
    weights = layout.weights
    losses, sums = backpropagate(
        model,
        tokens,
        weights,
        _squares,
        labelling=labelling,
        batch_size=batch_size,
        memory=memory,
        progress=progress,
    )
    label_tokens = tokens.lengths.astype(np.int64) - 1
    squares = dict(zip((weight.name for weight in weights), sums.numbers()[..., 0], strict=True))
    shapes = {weight.name: weight.shape for weight in weights}
    return (
        SensitivityMap(
            model_digest=origin.model_digest,
            calibration_digest=origin.calibration_digest,
            labels=labelling.labels,
            seed=labelling.seed,
            sequence_tokens=tuple(label_tokens.tolist()),
            loss_nats=float(losses.sum() / label_tokens.sum()),
            tied_embeddings=not {"output.weight"} & (squares.keys() | layout.unknown),
            tensors=_sensitivities(shapes, squares, label_tokens),
        ),
        {
            weight.name: _fisher(weight, sums.totals(index), int(label_tokens.sum()))
            for index, weight in enumerate(weights)
        },
    )


def merge(
    first: tuple[SensitivityMap, Mapping[str, Fisher]], more: tuple[SensitivityMap, Mapping[str, Fisher]]
) -> tuple[SensitivityMap, dict[str, Fisher]]:
    """Merge two measurements (map, fisher) of one model into the measurement of the sequences of both."""
    (one, one_fisher), (other, other_fisher) = first, more
    tokens = one.tokens + other.tokens
    squares = {
        name: np.array(tensor.sequence_squares + other.tensors[name].sequence_squares)
        for name, tensor in one.tensors.items()
    }
    shapes = {name: tensor.shape for name, tensor in one.tensors.items()}
    sequence_tokens = one.sequence_tokens + other.sequence_tokens
    merged = one.model_copy(
        update={
            "sequence_tokens": sequence_tokens,
            "loss_nats": (one.loss_nats * one.tokens + other.loss_nats * other.tokens) / tokens,
            "tensors": _sensitivities(shapes, squares, np.array(sequence_tokens)),
        }
    )
    fisher = {
        name: part.mixed(one.tokens / tokens, other_fisher[name], other.tokens / tokens)
        for name, part in one_fisher.items()
    }
    return merged, fisher


def _sensitivities(
    shapes: Mapping[str, tuple[int, ...]],
    squares: Mapping[str, np.ndarray],
    label_tokens: np.ndarray,
) -> dict[str, TensorSensitivity]:
    """GGUF name -> record, from `squares` (sequences,), the squared gradient norms of the sequences' summed losses."""
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
            fisher=squares[name].sum() / label_tokens.sum() / math.prod(shape),
            sequence_squares=tuple(squares[name].tolist()),
        )
        for name, shape in shapes.items()
    }


def _squares(index: int, gradients: Gradients) -> Reduced:
    """Squares of gradients: each sequence's sum, in nats^2 per squared weight; of each row and of each column, over sequences."""
    by_row, by_column = gradients.squares()
    return Reduced(by_row.sum(1, keepdim=True, dtype=torch.float64), (by_row.sum(0), by_column.sum(0)))


def _fisher(weight: Weight, totals: tuple[torch.Tensor, ...], label_tokens: int) -> Fisher:
    """The Fisher information of a weight, from the squares of each row and each column; zero if no gradient came for it."""
    *experts, rows, columns = weight.shape
    by_row, by_column = totals or (torch.zeros(math.prod(experts) * rows), torch.zeros(*experts, columns))
    return Fisher(
        (by_row / (columns * label_tokens)).numpy().reshape(*experts, rows), (by_column / (rows * label_tokens)).numpy()
    )
