"""Sensitivity of the loss to each weight tensor: gradient norms, and the Fisher information that prices a change.

One pass over the calibration sequences measures both. With g the gradient of one sequence's summed loss:

    gradient norm   the threshold method's measure: the L2 norm of the gradient of the sequence's mean loss, |g| / its
                    label tokens; mean over sequences, with its standard error. The score is the norm divided by the
                    model's largest.
    fisher          the sum over sequences of g^2, divided by all label tokens, in nats per token per squared weight.
                    Replacing W by W + dW costs about sum(fisher * dW^2) / 2 nats per token: the second-order term of
                    the KL divergence, without the terms between weights. Labels drawn from the model give the true
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
from samq.sensitivity.backpropagation import Labelling, backpropagate
from samq.sensitivity.fisher import Fisher
from samq.sensitivity.layout import GgufLayout, Weight
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
    second_moment: bool = True,
    progress: Progress = silent,
) -> tuple[SensitivityMap, dict[str, Fisher] | None]:
    """Measure every weight matrix of a causal LM on the sequences of `tokens`.

    Args:
        model: in any floating-point type, on any device; gradients are added up in float32 or wider.
        tokens: at least two sequences, for a standard error.
        layout: the model's weights as its GGUF has them.
        origin: digests for the map.
        labelling: the labels of the loss.
        batch_size: sequences a pass, which changes the figures by rounding only. For models with weights outside linear
            layers (GPT-2, mixtures of experts) it is 1.
        second_moment: whether to measure the Fisher information too.
        progress: told of the sequences that are done.

    Returns:
        The map, and GGUF name -> Fisher information, or None without `second_moment`.

    Raises:
        SamqError: too few sequences, NaN or Inf in a loss or gradient (names the tensor and the sequence), or too little
            GPU memory.
    """
    if len(tokens) < 2:
        raise SamqError(f"sensitivity needs at least 2 calibration sequences, not {len(tokens)}; give more text")
    weights = layout.weights
    sums = _Sums(weights, second_moment)
    losses, reduced = backpropagate(
        model,
        tokens,
        weights,
        sums.add,
        numbers=1,
        labelling=labelling,
        batch_size=batch_size,
        progress=progress,
    )
    label_tokens = tokens.lengths.astype(np.int64) - 1
    squares = dict(zip((weight.name for weight in weights), reduced[..., 0], strict=True))
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
            tensors=_sensitivities(shapes, squares, label_tokens, second_moment),
        ),
        sums.fisher(int(label_tokens.sum())) if second_moment else None,
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
            "tensors": _sensitivities(shapes, squares, np.array(sequence_tokens), True),
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
    second_moment: bool,
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
            fisher=squares[name].sum() / label_tokens.sum() / math.prod(shape) if second_moment else None,
            sequence_squares=tuple(squares[name].tolist()),
        )
        for name, shape in shapes.items()
    }


class _Sums:
    """The sums of squared gradients over all sequences, for each row and each column of every weight."""

    def __init__(self, weights: list[Weight], second_moment: bool) -> None:
        self.weights = weights
        self._second_moment = second_moment
        self._rows: dict[int, torch.Tensor] = {}  # weight's index -> (rows of all experts,)
        self._columns: dict[int, torch.Tensor] = {}  # (row length,), experts first if stacked

    def add(self, index: int, gradients: Gradients) -> torch.Tensor:
        """Add the squares of a batch's gradients; returns each sequence's sum, (sequences, 1), in nats^2 per squared weight."""
        by_row, by_column = gradients.squares()
        if self._second_moment:
            for sums, squares in ((self._rows, by_row), (self._columns, by_column)):
                if index in sums:
                    sums[index] += squares.sum(0)
                else:
                    sums[index] = squares.sum(0)
        total: torch.Tensor = by_row.sum(1, keepdim=True, dtype=torch.float64)
        return total

    def fisher(self, label_tokens: int) -> dict[str, Fisher]:
        """GGUF name -> Fisher information; zero for a weight that no gradient came for."""
        result = {}
        for index, weight in enumerate(self.weights):
            *experts, rows, columns = weight.shape
            by_row = self._rows.get(index, torch.zeros(math.prod(experts) * rows))
            by_column = self._columns.get(index, torch.zeros(*experts, columns))
            result[weight.name] = Fisher(
                (by_row / (columns * label_tokens)).cpu().numpy().reshape(*experts, rows),
                (by_column / (rows * label_tokens)).cpu().numpy(),
            )
        return result
